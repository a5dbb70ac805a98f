// Two pictures of one size, one over the other: the edge between them follows the mouse, a finger or the arrow keys.
export default {
  props: { left: String, right: String, names: Array },
  template: `
    <figure class="wipe">
      <div class="over" :style="{'--at': at + '%'}">
        <img :src="left" :alt="names[0]"><img :src="right" :alt="names[1]" class="top-one">
        <input type="range" min="0" max="100" step="0.5" v-model.number="at" aria-label="How much of the left picture is seen">
      </div>
      <figcaption class="row small soft"><span>{{ names[0] }}</span><span class="far">{{ names[1] }}</span></figcaption>
    </figure>`,
  data() {
    return { at: 50 };
  },
};
