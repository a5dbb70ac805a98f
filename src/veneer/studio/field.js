// A form field that keeps typed text while the page around the field is redrawn.
export default {
  props: {
    label: String, value: null, kind: String, hint: String, wait: Number, most: Number, options: Array,
    low: Number, high: Number, step: Number, shortcut: String, hides: Boolean, turn: Number, enters: Boolean,
  },
  emits: ["changed", "entered"],
  template: `
    <label :class="{check: kind === 'check'}" @focusout="left">
      <span class="name" :class="{unseen: hides}">{{ label }}</span>
      <textarea v-if="kind === 'area'" ref="box" v-model="now" rows="3" :placeholder="hint" :maxlength="most"
        :data-key="shortcut || null" @input="typed" @keydown.enter.ctrl="enter" @keydown.enter.meta="enter"></textarea>
      <select v-else-if="kind === 'choice'" v-model="now" :data-key="shortcut || null" @change="typed">
        <option v-for="each in options" :key="each[0]" :value="each[0]">{{ each[1] }}</option>
      </select>
      <span v-else-if="kind === 'range'" class="slide">
        <input type="range" v-model.number="now" :min="low" :max="high" :step="step || 'any'" :aria-label="label" @input="moved">
        <input type="number" v-model.number="now" :step="step || 'any'" :aria-label="label + ', as a number'" @change="moved">
      </span>
      <input v-else-if="kind === 'check'" type="checkbox" v-model="now" :data-key="shortcut || null" @change="send">
      <input v-else v-model="now" :type="kind" :placeholder="hint" :maxlength="most" :min="low" :max="high" :step="step"
        :data-key="shortcut || null" autocomplete="off" spellcheck="false" @input="typed" @keydown.enter="enter">
    </label>`,
  data() {
    return { now: this.value, timer: null, last: 0 };
  },
  watch: {
    turn() {
      clearTimeout(this.timer);
      this.timer = null;
      this.now = this.value;
      this.$nextTick(this.grow);
    },
  },
  mounted() {
    this.grow();
    if (this.$refs.box)  // a field drawn in a hidden view has no height yet
      new IntersectionObserver((seen, own) => {
        if (seen.some((each) => each.isIntersecting)) own.disconnect(), this.grow();
      }).observe(this.$refs.box);
  },
  methods: {
    said() {
      if (this.kind !== "number" && this.kind !== "range") return this.now;
      const number = typeof this.now === "number" ? this.now : parseFloat(this.now);
      return Number.isFinite(number) ? number : null;
    },
    send() {
      clearTimeout(this.timer);
      this.timer = null;
      this.last = performance.now();
      this.$emit("changed", this.said());
    },
    typed() {
      this.grow();
      clearTimeout(this.timer);
      this.timer = setTimeout(() => this.send(), this.kind === "choice" ? 0 : 1000 * this.wait);
    },
    moved() {
      if (this.timer) return;
      const rest = Math.max(0, this.last + 1000 * this.wait - performance.now());
      this.timer = setTimeout(() => this.send(), rest);
    },
    left() {  // send typed text before the click that took the focus
      const said = this.said();
      if (this.kind === "number" && said !== null) this.now = Math.min(this.high ?? said, Math.max(this.low ?? said, said));
      if (this.timer) this.send();
    },
    enter(e) {
      if (!this.enters) {  // Ctrl+Enter presses a button: send typed text first
        if (this.timer) this.send();
        return;
      }
      e.preventDefault();
      clearTimeout(this.timer);
      this.timer = null;
      this.$emit("entered", this.said());
    },
    grow() {
      const box = this.$refs.box;
      if (!box) return;
      box.style.height = "auto";
      box.style.height = `${Math.min(box.scrollHeight + 2, 320)}px`;
    },
  },
};
