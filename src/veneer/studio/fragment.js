// HTML that is redrawn on changes (elements.py, Fragment). Unchanged nodes stay the same elements and are never moved,
// so that a started click ends on its element, and focus, open details and scroll position stay.

// Identity of a node: its data-id; without one, its tag and class.
const mark = (node) => `${node.nodeName} ${node.dataset?.id ? `#${node.dataset.id}` : node.getAttribute?.("class") || ""}`;

function become(now, then) {
  if (now.isEqualNode(then)) return;
  if (now.nodeType !== Node.ELEMENT_NODE) return (now.data = then.data);
  for (const { name } of [...now.attributes])
    if (!then.hasAttribute(name) && name !== "open") now.removeAttribute(name); // a user opened the details
  for (const { name, value } of then.attributes) if (now.getAttribute(name) !== value) now.setAttribute(name, value);
  fill(now, then);
}

// Replace the children of `now` by those of `then`; keep their longest common subsequence.
function fill(now, then) {
  const a = [...now.childNodes], b = [...then.childNodes], as = a.map(mark), bs = b.map(mark);
  let start = 0, n = a.length, m = b.length;
  while (start < n && start < m && as[start] === bs[start]) start++;
  while (n > start && m > start && as[n - 1] === bs[m - 1]) n--, m--;
  const wide = m - start + 1, common = new Uint16Array((n - start + 1) * wide); // [i, j]: length of the common subsequence of a[i:] and b[j:]
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
