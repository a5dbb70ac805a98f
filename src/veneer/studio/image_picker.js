// One image from the visitor's disk, scaled down to fit the page's socket, as a data: URL.
export default {
  props: { label: String },
  emits: ["picked"],
  template: `
    <div class="field image-picker">
      <label><span class="name">{{ label }}</span>
      <input ref="file" type="file" accept="image/png,image/jpeg,image/webp" @change="pick"></label>
      <div v-if="src" class="row"><img :src="src" alt="The control image"><button type="button" class="button word" @click="clear">Remove</button></div>
    </div>`,
  data() {
    return { src: "" };
  },
  methods: {
    async pick(e) {
      const file = e.target.files[0];
      if (!file) return;
      const image = await createImageBitmap(file);
      for (let side = Math.min(1024, Math.max(image.width, image.height)); ; side *= 0.8) {
        const scale = side / Math.max(image.width, image.height), canvas = document.createElement("canvas");
        canvas.width = Math.round(image.width * scale);
        canvas.height = Math.round(image.height * scale);
        canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
        this.src = canvas.toDataURL("image/jpeg", 0.92);
        if (this.src.length < 700000) break;
      }
      this.$emit("picked", this.src);
    },
    clear() {
      this.src = "";
      this.$refs.file.value = "";
      this.$emit("picked", "");
    },
  },
};
