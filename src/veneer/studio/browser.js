// What only the browser can do. Mounted once a page; the server calls its methods (frame.py, Frame.tell).
const themes = { "": "System", light: "Light", dark: "Dark" };
const ours = (path) => path === window.path_prefix || path.startsWith(window.path_prefix + "/");
const typing = (at) => at && (at.isContentEditable || /^(TEXTAREA|SELECT)$/.test(at.tagName) ||
  (at.tagName === "INPUT" && !/^(checkbox|radio|range|button)$/.test(at.type)));

export default {
  template: `<div hidden></div>`,
  emits: ["go"],
  mounted() {
    this.chord = "";
    document.getElementById("shell")?.remove();
    document.addEventListener("click", this.clicked);
    document.addEventListener("keydown", this.pressed);
    document.addEventListener("focusin", (e) => (this.focused = e.target.dataset?.id || ""));
    window.addEventListener("popstate", () => this.$emit("go", location.pathname + location.search));
    new MutationObserver(this.refocus).observe(document.body, { childList: true, subtree: true });
    this.themed();
  },
  methods: {
    keep(path, said) {
      history.replaceState(null, "", said ? `${path}?${said}` : path);
    },
    went(to) {
      history.pushState(null, "", to);
      window.scrollTo(0, 0);
    },
    named(title) {
      document.title = title;
    },
    said() {
      const at = document.querySelector(".status");
      if (!at) return;
      at.classList.add("fresh");
      clearTimeout(this.fading);
      this.fading = setTimeout(() => at.classList.remove("fresh"), 6000);
    },
    again() {
      location.reload();
    },
    // -- links, copying, light and dark
    clicked(e) {
      const copy = e.target.closest("[data-copy]");
      if (copy) {
        e.preventDefault();
        navigator.clipboard?.writeText(copy.dataset.copy);
        const was = copy.textContent;
        copy.textContent = "copied";
        setTimeout(() => (copy.textContent = was), 1200);
        return;
      }
      if (e.target.closest("[data-theme=next]")) {
        const order = Object.keys(themes);
        const now = document.documentElement.dataset.theme || "";
        localStorage.setItem("veneer-theme", order[(order.indexOf(now) + 1) % order.length]);
        return this.themed();
      }
      const link = e.target.closest("a[href]");
      if (!link || e.defaultPrevented || e.button || e.ctrlKey || e.metaKey || e.shiftKey || e.altKey) return;
      const to = new URL(link.href, location.href);
      if (link.target || link.hasAttribute("download") || to.origin !== location.origin || !ours(to.pathname)) return;
      if (to.pathname.startsWith(`${window.path_prefix}/api/`)) return;
      e.preventDefault();
      this.went(to.pathname + to.search);
      this.$emit("go", to.pathname + to.search);
    },
    themed() {
      const now = localStorage.getItem("veneer-theme") || "";
      document.documentElement.dataset.theme = now;
      const at = document.querySelector("[data-theme=next]");
      if (!at) return;
      at.textContent = themes[now];
      at.setAttribute("aria-label", `Light or dark: ${themes[now]}`);
    },
    // -- keys: an element says in data-key what presses it, or gives it focus where it is a field
    pressed(e) {
      if (e.defaultPrevented || e.altKey || e.isComposing) return;
      const name = e.key.length === 1 ? e.key.toLowerCase() : e.key === "Enter" ? "enter" : e.key;
      const inside = document.querySelector("dialog[open]") || document;
      const at = (key) => [...inside.querySelectorAll(`[data-key="${CSS.escape(key)}"]`)].find((el) => el.offsetParent);
      if (e.ctrlKey || e.metaKey) {
        const el = at(`ctrl+${name}`);
        if (el && !(typing(document.activeElement) && name === "enter" && document.activeElement.tagName === "TEXTAREA"))
          this.press(el, e);
        return;
      }
      if (e.key === "Escape" && typing(document.activeElement)) return document.activeElement.blur();
      if (typing(document.activeElement)) return;
      if (this.step(e, name)) return;
      const chord = this.chord && `${this.chord} ${name}`;
      this.chord = name === "g" ? "g" : "";
      const el = at(chord) || at(name);
      if (el) this.press(el, e);
    },
    press(el, e) {
      e.preventDefault();
      if (typing(el)) el.select ? el.select() : el.focus();
      else el.click();
      if (typing(el)) el.focus();
    },
    // -- j and k, or the arrows, from one thing of a list to the next; Enter is the link's own
    step(e, name) {
      const by = { j: 1, ArrowDown: 1, k: -1, ArrowUp: -1 }[name];
      if (!by || this.chord) return false;
      const all = [...document.querySelectorAll("[data-step]")].filter((el) => el.offsetParent);
      if (!all.length) return false;
      const now = all.indexOf(document.activeElement.closest?.("[data-step]") ?? document.activeElement);
      const next = all[Math.min(all.length - 1, Math.max(0, now < 0 ? 0 : now + by))];
      e.preventDefault();
      next.focus();
      next.scrollIntoView({ block: "nearest" });
      return true;
    },
    // -- what is drawn anew keeps the focus
    refocus() {
      if (!this.focused || (document.activeElement && document.activeElement !== document.body)) return;
      document.querySelector(`[data-id="${CSS.escape(this.focused)}"]`)?.focus({ preventScroll: true });
    },
  },
};
