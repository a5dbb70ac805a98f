// The pictures of one column, a seed each, and how far each is. One that is marked waits for another, for the wipe.
// A small one is shown at a whole multiple of its size, and a very small one with the pixels that it has.
const ROOM = 300, BLOCKY = 96;
export default {
  props: { label: String },
  emits: ["marked"],
  template: `
    <div class="drawn">
      <figure v-for="(one, i) in pictures" :key="i" :aria-busy="!one.src" :style="{flexBasis: one.wide + 'px'}">
        <div class="canvas" :class="{blocky: one.blocky}" :style="{aspectRatio: one.shape, maxWidth: one.wide + 'px'}">
          <img v-if="one.src" :src="one.src" :alt="label + ', seed ' + one.seed">
          <progress v-else :value="one.share" max="1" :aria-label="label + ', seed ' + one.seed"></progress>
        </div>
        <figcaption class="row small soft"><span>seed {{ one.seed }}</span><span class="far">{{ one.note }}</span>
          <button v-if="one.src" type="button" class="chip" :aria-pressed="one.marked" :aria-label="'Lay ' + label + ', seed ' + one.seed + ' over another'"
            @click="$emit('marked', i)">Lay over</button></figcaption>
      </figure>
    </div>`,
  data() {
    return { pictures: [] };
  },
  methods: {
    begin(seeds, width, height) {
      const shape = `${width} / ${height}`, wide = width * Math.max(1, Math.floor(ROOM / width)), blocky = width <= BLOCKY;
      this.pictures = seeds.map((seed) => ({ seed, shape, wide, blocky, src: "", share: 0, note: "", marked: false }));
    },
    step(i, share) {
      if (this.pictures[i]) this.pictures[i].share = share;
    },
    show(i, src, note) {
      if (this.pictures[i]) Object.assign(this.pictures[i], { src, note });
    },
    lay(i, marked) {
      if (this.pictures[i]) this.pictures[i].marked = marked;
    },
  },
};
