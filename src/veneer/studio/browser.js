// Features that need the browser. Mounted once per page; the server calls the methods (page.py, Frame.call_browser).
const themes = { "": "System", light: "Light", dark: "Dark" };
const ours = (path) => path === window.path_prefix || path.startsWith(window.path_prefix + "/");
const typing = (at) => at && (at.isContentEditable || /^(TEXTAREA|SELECT)$/.test(at.tagName) ||
  (at.tagName === "INPUT" && !/^(checkbox|radio|range|button)$/.test(at.type)));
const seen = (el) => el.checkVisibility?.({ visibilityProperty: true }) ?? el.offsetParent;
const called = (el) => (el.getAttribute("aria-label") || el.closest("label")?.querySelector(".name")?.textContent || el.textContent).trim();

export default {
  props: { words: String },
  template: `
    <div>
      <div v-if="over" class="dropping"><p>{{ words }}</p></div>
      <div v-if="sending" class="sending" role="status"><span>{{ sending }}</span>
        <progress max="1" :value="share" aria-label="Upload"></progress></div>
      <input ref="pick" type="file" multiple hidden tabindex="-1" aria-hidden="true" @change="picked">
      <dialog ref="keys" class="dialog" aria-label="Shortcuts"><h2>Shortcuts</h2>
        <table class="plain"><tr v-for="each in known" :key="each[0] + each[1]"><th scope="row"><kbd v-for="key in each[0].split(' ')">{{ key }}</kbd></th><td>{{ each[1] }}</td></tr></table>
        <div class="row end"><button type="button" class="button quiet" @click="$refs.keys.close()">Close</button></div></dialog>
      <dialog ref="finder" class="dialog finder" aria-label="Search everything">
        <input type="search" v-model="searched" placeholder="An adapter, a run, a route or an action" aria-label="Search everything" role="combobox"
          aria-expanded="true" aria-controls="results" :aria-activedescendant="results[at] ? 'find-' + at : null" autocomplete="off" spellcheck="false" @input="seek"
          @keydown.down.prevent="at = Math.min(at + 1, results.length - 1)" @keydown.up.prevent="at = Math.max(at - 1, 0)" @keydown.enter.prevent="take(results[at])">
        <ul id="results" role="listbox" aria-label="Results"><li v-for="(each, n) in results" :key="n" :id="'find-' + n" role="option" :aria-selected="n === at" @click="take(each)">
          <span>{{ each.title }}</span><span class="soft small">{{ each.kind }}</span></li></ul></dialog>
    </div>`,
  emits: ["navigate", "search", "dropped", "sent"],
  data() {
    return { over: false, sending: "", share: 0, known: [], searched: "", results: [], at: 0 };
  },
  mounted() {
    this.chord = "";
    this.files = [];
    document.addEventListener("click", this.clicked);
    document.addEventListener("keydown", this.pressed);
    document.addEventListener("focusin", (e) => (this.focused = e.target.dataset?.id || ""));
    window.addEventListener("popstate", () => this.$emit("navigate", location.pathname + location.search));
    new MutationObserver(this.changed).observe(document.body, { childList: true, subtree: true });
    const dragged = (e) => e.dataTransfer && [...e.dataTransfer.types].includes("Files");
    window.addEventListener("dragover", (e) => {
      if (!dragged(e)) return;
      e.preventDefault();
      this.over = true;
    });
    window.addEventListener("dragleave", (e) => !e.relatedTarget && (this.over = false));
    window.addEventListener("drop", (e) => {
      this.over = false;
      if (!dragged(e)) return;
      e.preventDefault();
      this.offer([...e.dataTransfer.files]);
    });
    this.more = new IntersectionObserver((all) => all.forEach((each) => each.isIntersecting && each.target.click()), { rootMargin: "600px" });
    this.themed();
    this.changed();
  },
  methods: {
    setQuery(path, query) {
      if (location.pathname.replace(/\/+$/, "") !== path.replace(/\/+$/, "")) return; // the user left the view meanwhile
      history.replaceState(null, "", query ? `${path}?${query}` : path);
    },
    navigated(to) {
      history.pushState(null, "", to);
      window.scrollTo(0, 0);
    },
    setTitle(title) {
      document.title = title;
    },
    showStatus() {
      const at = document.querySelector(".status");
      if (!at) return;
      at.classList.add("fresh");
      clearTimeout(this.fading);
      this.fading = setTimeout(() => at.classList.remove("fresh"), 6000);
    },
    reload() {
      location.reload();
    },
    // -- links, copying, light and dark
    go(to) {
      this.navigated(to);
      this.$emit("navigate", to);
    },
    clicked(e) {
      const copy = e.target.closest("[data-copy]");
      if (copy) {
        e.preventDefault();
        navigator.clipboard?.writeText(copy.dataset.copy);
        const was = copy.textContent;
        if (was !== "copied") setTimeout(() => (copy.textContent = was), 1200);
        copy.textContent = "copied";
        return;
      }
      if (e.target.closest("[data-theme=next]")) {
        const order = Object.keys(themes);
        const now = document.documentElement.dataset.theme || "";
        localStorage.setItem("veneer-theme", order[(order.indexOf(now) + 1) % order.length]);
        return this.themed();
      }
      if (e.target.closest("[data-does=keys]")) return this.showKeys();
      if (e.target.closest("[data-does=find]")) return this.find();
      if (e.target.tagName === "DIALOG") {
        const box = e.target.getBoundingClientRect(); // a click outside the dialog
        if (e.clientY < box.top || e.clientY > box.bottom || e.clientX < box.left || e.clientX > box.right) e.target.close();
      }
      const link = e.target.closest("a[href]");
      if (!link || e.defaultPrevented || e.button || e.ctrlKey || e.metaKey || e.shiftKey || e.altKey) return;
      const to = new URL(link.href, location.href);
      if (link.target || link.hasAttribute("download") || to.origin !== location.origin || !ours(to.pathname)) return;
      if (to.pathname.startsWith(`${window.path_prefix}/api/`)) return;
      e.preventDefault();
      this.go(to.pathname + to.search);
    },
    themed() {
      const now = localStorage.getItem("veneer-theme") || "";
      document.documentElement.dataset.theme = now;
      const at = document.querySelector("[data-theme=next]");
      if (!at) return;
      at.textContent = `◐ ${themes[now]}`;
      at.setAttribute("aria-label", `Color scheme: ${themes[now]}`);
    },
    // -- keys: data-key of an element is the key that presses the element, or focuses a field
    pressed(e) {
      if (e.defaultPrevented || e.altKey || e.isComposing) return;
      const name = e.key.length === 1 ? e.key.toLowerCase() : e.key === "Enter" ? "enter" : e.key;
      const inside = document.querySelector("dialog[open]") || document;
      const at = (key) => key && [...inside.querySelectorAll(`[data-key="${CSS.escape(key)}"]`)].find(seen);
      const has = document.activeElement; // a closed dialog's field keeps the focus until the next frame
      const now = has && seen(has) ? has : document.body;
      if (e.ctrlKey || e.metaKey) {
        if (name === "k") return this.find(e);
        const el = at(`ctrl+${name}`);
        if (el && !(name === "enter" && now.tagName === "TEXTAREA")) this.press(el, e);
        return;
      }
      if (e.key === "Escape" && typing(now) && inside === document) return now.blur();
      if (typing(now) || now?.type === "range") return;
      if (name === "?") return this.showKeys(e);
      if (this.step(e, name)) return;
      const el = at(this.chord && `${this.chord} ${name}`) || this.beside(name, now) || at(name);
      this.chord = !el && name === "g" ? "g" : "";
      if (el) this.press(el, e);
    },
    // data-own: key that presses an element of the focused card or row
    beside(name, now) {
      return now?.closest?.("li, tr, section")?.querySelector(`[data-own="${CSS.escape(name)}"]`);
    },
    press(el, e) {
      e.preventDefault();
      if (!typing(el)) return el.click();
      el.focus();
      el.select?.();
    },
    step(e, name) {
      const by = { j: 1, ArrowDown: 1, k: -1, ArrowUp: -1 }[name];
      if (!by || this.chord) return false;
      const all = [...document.querySelectorAll("[data-step]")].filter(seen);
      if (!all.length || document.querySelector("dialog[open]")) return false;
      const now = all.indexOf(document.activeElement);
      if (now < 0 && name.startsWith("Arrow")) return false; // arrow keys scroll until an item is focused
      const next = all[Math.min(all.length - 1, Math.max(0, now < 0 ? 0 : now + by))];
      e.preventDefault();
      next.focus();
      next.scrollIntoView({ block: "nearest" });
      return true;
    },
    showKeys(e) {
      e?.preventDefault();
      const here = [...document.querySelectorAll("[data-key]")].filter(seen).map((el) => [el.dataset.key, called(el)]);
      const own = [...new Map([...document.querySelectorAll("[data-own]")].map((el) => [el.dataset.own, el.dataset.words || called(el)]))];
      const steps = document.querySelector("[data-step]") ? [["j k", "Next, previous"], ["Enter", "Open"], ...own] : [];
      this.known = [...here, ...steps, ["ctrl+k", "Search"], ["?", "Shortcuts"], ["Esc", "Close"]];
      this.$refs.keys.showModal();
    },
    // -- search
    find(e) {
      e?.preventDefault();
      this.searched = "";
      this.seek();
      this.$refs.finder.showModal();
    },
    seek() {
      clearTimeout(this.seeking);
      this.seeking = setTimeout(() => this.$emit("search", this.searched), 60);
    },
    showResults(searched, results) {
      if (searched !== this.searched) return;
      const words = searched.toLowerCase().split(/\s+/);
      const acts = [...document.querySelectorAll("button[data-key]")].filter(seen)
        .map((el) => ({ title: called(el), kind: `here · ${el.dataset.key}`, el }))
        .filter((each) => words.every((word) => each.title.toLowerCase().includes(word)));
      this.results = [...results, ...acts];
      this.at = 0;
    },
    take(each) {
      if (!each) return;
      this.$refs.finder.close();
      if (each.el) each.el.click();
      else this.go(each.to);
    },
    // -- files, dropped or picked: the server names each upload URL
    pickFile() {
      this.$refs.pick.click();
    },
    picked(e) {
      this.offer([...e.target.files]);
      e.target.value = "";
    },
    offer(files) {
      this.files = files;
      if (files.length) this.$emit("dropped", files.map((file) => file.name));
    },
    send(n, url, fields) {
      const file = this.files[n];
      const request = new XMLHttpRequest();
      request.upload.onprogress = (e) => (this.share = e.total ? e.loaded / e.total : 0);
      request.onload = () => this.ended(n, request.status, request.responseText);
      request.onerror = () => this.ended(n, 0, "");
      this.share = 0;
      this.sending = file.name;
      request.open("POST", url);
      if (!fields) request.setRequestHeader("content-type", "application/octet-stream");
      const form = new FormData();
      for (const [name, value] of Object.entries(fields || {})) form.append(name, value);
      form.append("file", file);
      request.send(fields ? form : file);
    },
    ended(n, status, text) {
      this.sending = "";
      this.$emit("sent", { n, status, text: text.slice(0, 200000) });
    },
    // -- keep the focus after a redraw; press [data-more] at the end of a list
    changed() {
      const now = document.activeElement;
      if (this.focused && (!now || now === document.body))
        document.querySelector(`[data-id="${CSS.escape(this.focused)}"]`)?.focus({ preventScroll: true });
      document.querySelectorAll("[data-more]").forEach((el) => this.more.observe(el));
    },
  },
};
