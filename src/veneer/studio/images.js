// The images of one column, one per seed, with the progress of each.
// A small image is shown at a whole multiple of its size, a very small one with visible pixels.
const WIDTH = 300, BLOCKY = 96;
export default {
  props: { label: String },
  template: `
    <div class="drawn">
      <figure v-for="(one, i) in images" :key="i" :aria-busy="!one.src" :style="{flexBasis: one.wide + 'px'}">
        <div class="canvas" :class="{blocky: one.blocky}" :style="{aspectRatio: one.shape, maxWidth: one.wide + 'px'}">
          <img v-if="one.src" :src="one.src" :alt="label + ', seed ' + one.seed">
          <progress v-else :value="one.share" max="1" :aria-label="label + ', seed ' + one.seed"></progress>
        </div>
        <figcaption class="row small soft"><span>seed {{ one.seed }}</span><span class="far">{{ one.note }}</span></figcaption>
      </figure>
    </div>`,
  data() {
    return { images: [] };
  },
  methods: {
    begin(seeds, width, height) {
      const shape = `${width} / ${height}`, wide = width * Math.max(1, Math.floor(WIDTH / width)), blocky = width <= BLOCKY;
      this.images = seeds.map((seed) => ({ seed, shape, wide, blocky, src: "", share: 0, note: "" }));
    },
    step(i, share) {
      if (this.images[i]) this.images[i].share = share;
    },
    show(i, src, note) {
      if (this.images[i]) Object.assign(this.images[i], { src, note });
    },
  },
};
