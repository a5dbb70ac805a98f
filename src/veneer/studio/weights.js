// Shares of a whole as one bar: the edge between two is dragged, or moved by the arrow keys (with Shift by ten).
export default {
  props: { parts: Array },
  emits: ["moved"],
  template: `
    <div class="weights" ref="bar" role="group" aria-label="Shares of users">
      <template v-for="(part, i) in now" :key="part[0]">
        <div class="share" :class="'share-' + (i % 4)" :style="{flexGrow: part[1]}" :title="part[0]">
          <b>{{ shown(part[1]) }}</b> <span>{{ part[0] }}</span></div>
        <button v-if="i < now.length - 1" type="button" class="edge" role="slider" :data-id="'edge-' + i"
          :aria-label="part[0] + ' against ' + now[i + 1][0]" aria-valuemin="0" :aria-valuemax="part[1] + now[i + 1][1]"
          :aria-valuenow="part[1]" :aria-valuetext="shown(part[1]) + ' and ' + shown(now[i + 1][1])"
          @keydown="pressed(i, $event)" @pointerdown="grab(i, $event)" @pointermove="drag($event)" @pointerup="drop" @pointercancel="drop"></button>
      </template>
    </div>`,
  data() {
    return { now: this.parts.map((p) => [...p]), held: -1 };
  },
  watch: {
    parts(other) {
      this.held = -1; // a move of somebody else's lets go of an edge
      this.now = other.map((p) => [...p]);
    },
  },
  methods: {
    shown(weight) {
      return `${Math.round(weight * 100) / 100} %`;
    },
    give(i, left) {
      const both = this.now[i][1] + this.now[i + 1][1];
      const mine = Math.min(both, Math.max(0, left));
      if (mine === this.now[i][1]) return;
      this.now[i][1] = mine;
      this.now[i + 1][1] = both - mine;
      clearTimeout(this.timer);
      this.timer = setTimeout(() => this.$emit("moved", this.now.map((p) => p[1])), 60);
    },
    pressed(i, e) {
      const by = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[e.key];
      const to = e.key === "Home" ? 0 : e.key === "End" ? Infinity : by ? this.now[i][1] + by * (e.shiftKey ? 10 : 1) : null;
      if (to === null) return;
      e.preventDefault();
      e.stopPropagation();
      this.give(i, to);
    },
    grab(i, e) {
      this.held = i;
      e.target.setPointerCapture(e.pointerId);
    },
    drag(e) {
      if (this.held < 0) return;
      const bar = this.$refs.bar.getBoundingClientRect();
      const before = this.now.slice(0, this.held).reduce((sum, p) => sum + p[1], 0);
      this.give(this.held, Math.round(((e.clientX - bar.left) / bar.width) * 100) - before);
    },
    drop() {
      this.held = -1;
    },
  },
};
