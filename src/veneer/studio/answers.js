// The answers of one column, token by token. Tokens that differ from the first column's answer are marked.
// The line under each answer shows the probabilities of the token under the mouse or selected by the arrow keys.
const first = []; // the first column's tokens, of each of its answers
const others = new Set(); // columns that are compared with it
const LONGEST = 700; // tokens beyond which two answers are compared once they are whole

// Which of b's tokens are not in the longest common subsequence of both.
function different(a, b) {
  let start = 0;
  while (start < a.length && start < b.length && a[start] === b[start]) start++;
  let end = 0;
  while (end < a.length - start && end < b.length - start && a[a.length - 1 - end] === b[b.length - 1 - end]) end++;
  const n = a.length - start - end, m = b.length - start - end, wide = m + 1;
  const common = new Uint16Array((n + 1) * wide);
  for (let i = n - 1; i >= 0; i--)
    for (let j = m - 1; j >= 0; j--)
      common[i * wide + j] = a[start + i] === b[start + j] ? common[(i + 1) * wide + j + 1] + 1
        : Math.max(common[(i + 1) * wide + j], common[i * wide + j + 1]);
  const found = new Set();
  for (let i = 0, j = 0; j < m; ) {
    if (i < n && a[start + i] === b[start + j]) i++, j++;
    else if (i < n && common[(i + 1) * wide + j] >= common[i * wide + j + 1]) i++;
    else found.add(start + j++);
  }
  return found;
}
const share = (logprob) => {
  const p = 100 * Math.exp(logprob);
  return p >= 99.95 ? "100%" : p >= 1 ? `${p.toFixed(0)}%` : p >= 0.01 ? `${p.toFixed(2)}%` : "under 0.01%";
};
const shown = (text) => (text.trim() === "" ? JSON.stringify(text).slice(1, -1).replace(/ /g, "␣") || "∅" : text.replace(/^ /, ""));

export default {
  props: { label: String, leads: Boolean, position: Number, votes: Boolean },
  emits: ["better", "corrected"],
  template: `
    <div class="answers">
      <div v-for="(one, i) in answers" :key="i" class="spoken">
        <div class="answer" tabindex="0" role="group" :aria-label="(answers.length > 1 ? 'Answer ' + (i + 1) + ' of ' : 'Answer of ') + label"
          @keydown.left.prevent="step(i, -1)" @keydown.right.prevent="step(i, 1)" @blur="leave(i)" @mouseleave="leave(i)"
          @mouseover="over(i, $event)"><span v-for="(token, k) in one.tokens" :key="k" :data-k="k"
          :class="{other: one.other.has(k), at: at.i === i && at.k === k}">{{ token[0] }}<wbr v-if="folds(token[0])"></span><span v-if="!one.note" class="caret" aria-hidden="true"></span></div>
        <p class="told small soft" :aria-live="at.i === i ? 'polite' : 'off'">{{ told(i) }}</p>
        <div v-if="one.note" class="row">
          <button v-if="votes" type="button" class="chip" :data-key="i ? null : String(position)" :aria-keyshortcuts="i ? null : String(position)"
            :aria-label="label + ' is better'" @click="$emit('better', i)">Better</button>
          <button type="button" class="chip" :aria-expanded="one.mending !== null" :aria-label="'Correct the answer of ' + label"
            @click="mend(i)">Correct</button>
          <span class="small soft judged" role="status">{{ one.judged }}</span>
        </div>
        <form v-if="one.mending !== null" class="field mend" @submit.prevent="send(i)">
          <textarea v-model="one.mending" rows="4" maxlength="20000" :aria-label="'Corrected answer of ' + label"
            @keydown.enter.ctrl.prevent="send(i)" @keydown.esc.stop="one.mending = null"></textarea>
          <button type="submit" class="button quiet">Save correction</button>
        </form>
      </div>
    </div>`,
  data() {
    return { answers: [], at: { i: -1, k: -1 } };
  },
  mounted() {
    others.add(this);
  },
  unmounted() {
    others.delete(this);
    if (this.leads) first.length = 0;
  },
  methods: {
    folds(text) {
      return /[,;:]"?$/.test(text); // JSON without spaces has lines, too
    },
    begin(count) {
      this.at = { i: -1, k: -1 };
      this.answers = Array.from({ length: count }, () => ({ tokens: [], other: new Set(), note: "", mending: null, judged: "" }));
      if (this.leads) first.length = 0;
    },
    // tokens: [which answer, [text, logprob, [[text, logprob], …]]]
    add(tokens) {
      for (const [i, token] of tokens) this.answers[i]?.tokens.push(token);
      this.compare();
    },
    end(i, note) {
      if (this.answers[i]) this.answers[i].note = note;
      this.compare();
    },
    judged(i, text) {
      if (this.answers[i]) Object.assign(this.answers[i], { judged: text, mending: null });
    },
    compare() {
      if (!this.leads) return this.soon();
      for (const [i, one] of this.answers.entries()) first[i] = one.tokens.map((t) => t[0]);
      for (const other of others) if (other !== this) other.soon();
    },
    soon() {
      if (this.waits) return;
      this.waits = requestAnimationFrame(() => {
        this.waits = 0;
        for (const [i, one] of this.answers.entries()) {
          const mine = one.tokens.map((t) => t[0]), base = (first[i] || []).slice(0, one.note ? undefined : mine.length);
          if (!first[i] || (mine.length > LONGEST && !one.note)) continue;
          if (mine.length * base.length < 4e6) one.other = different(base, mine);
        }
      });
    },
    over(i, e) {
      const k = e.target.dataset?.k;
      if (k !== undefined) this.at = { i, k: Number(k) };
    },
    step(i, by) {
      const last = this.answers[i].tokens.length - 1;
      const k = this.at.i === i ? this.at.k + by : by > 0 ? 0 : last;
      this.at = { i, k: Math.min(last, Math.max(0, k)) };
    },
    leave(i) {
      if (this.at.i === i) this.at = { i: -1, k: -1 };
    },
    told(i) {
      const one = this.answers[i];
      if (this.at.i !== i) return one.note;
      const token = one.tokens[this.at.k];
      if (!token || token[1] === null) return one.note;
      const rest = token[2].filter(([text]) => text !== token[0]).slice(0, 3);
      const instead = rest.length ? " · alternatives: " + rest.map(([text, p]) => `“${shown(text)}” ${share(p)}`).join(", ") : "";
      return `“${shown(token[0])}” ${share(token[1])}, log-probability ${Math.min(0, token[1]).toFixed(2).replace("-", "−")}${instead}`;
    },
    mend(i) {
      const one = this.answers[i];
      one.mending = one.mending === null ? one.tokens.map((t) => t[0]).join("").trim() : null;
      if (one.mending !== null) this.$nextTick(() => this.$el.querySelector(".mend textarea")?.focus());
    },
    send(i) {
      this.$emit("corrected", [i, this.answers[i].mending]);
    },
  },
};
