// HTML that is drawn anew now and then (parts.py, Fragment). What goes on as it was is the very same element afterwards, never moved: a click that
// has begun on it ends on it, and it keeps the focus, what is open in it and how far it is scrolled.

// By what it goes on: its data-id; without one, what it is and how it looks.
const mark = (node) => `${node.nodeName} ${node.dataset?.id ? `#${node.dataset.id}` : node.getAttribute?.("class") || ""}`;

function become(now, then) {
  if (now.isEqualNode(then)) return;
  if (now.nodeType !== Node.ELEMENT_NODE) return (now.data = then.data);
  for (const { name } of [...now.attributes])
    if (!then.hasAttribute(name) && name !== "open") now.removeAttribute(name); // somebody opened it
  for (const { name, value } of then.attributes) if (now.getAttribute(name) !== value) now.setAttribute(name, value);
  fill(now, then);
}

// The children of `now` become those of `then`; of both, the longest common subsequence goes on.
function fill(now, then) {
  const a = [...now.childNodes], b = [...then.childNodes], as = a.map(mark), bs = b.map(mark);
  let start = 0, n = a.length, m = b.length;
  while (start < n && start < m && as[start] === bs[start]) start++;
  while (n > start && m > start && as[n - 1] === bs[m - 1]) n--, m--;
  const wide = m - start + 1, common = new Uint16Array((n - start + 1) * wide); // [i, j]: how many of a's from i on go on among b's from j on
  for (let i = n - 1; i >= start; i--)
    for (let j = m - 1; j >= start; j--) {
      const at = (i - start) * wide + j - start;
      common[at] = as[i] === bs[j] ? common[at + wide + 1] + 1 : Math.max(common[at + wide], common[at + 1]);
    }
  let i = 0, j = 0;
  while (i < a.length || j < b.length) {
    const at = (i - start) * wide + j - start;
    if ((i < n) === (j < m) && as[i] === bs[j]) become(a[i++], b[j++]);
    else if (j === m || (i < n && common[at + wide] >= common[at + 1])) a[i++].remove();
    else now.insertBefore(b[j++], a[i] || null);
  }
}

export default {
  props: { html: String },
  template: `<div></div>`,
  mounted() {
    this.$el.innerHTML = this.html;
  },
  watch: {
    html(other) {
      const then = document.createElement("template");
      then.innerHTML = other;
      fill(this.$el, then.content);
    },
  },
};
