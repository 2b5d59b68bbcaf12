// Data, elements, numbers. All text goes through textContent: nothing of a run can become markup.
const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs;
const ONE = RUNS.length === 1;
const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "vars") for (const [k, v] of Object.entries(value)) node.style.setProperty(k, v);
    else node.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat(9)) {
    if (child === null || child === undefined || child === false) continue;
    node.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
  return node;
}
const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const sv = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

const MINUS = "\u2212";
const isNumber = (x) => typeof x === "number" && Number.isFinite(x);
function fixed(x, digits = 1) {
  return isNumber(x) ? x.toFixed(digits).replace("-", MINUS) : "\u2013";
}
function signed(x, digits = 1) {
  if (!isNumber(x)) return "\u2013";
  const text = fixed(x, digits);
  return x > 0 && Number(x.toFixed(digits)) > 0 ? "+" + text : text;
}
// four significant digits, short and never in exponents where a person can read the number plainly
function short(x) {
  if (!isNumber(x)) return "\u2013";
  const size = Math.abs(x);
  if (size === 0) return "0";
  if (size >= 1e5) return Math.round(x).toLocaleString("en-US").replace("-", MINUS);
  if (size >= 1000) return Math.round(x).toLocaleString("en-US").replace("-", MINUS);
  if (size < 1e-4) return x.toExponential(1).replace(/-/g, MINUS);
  const digits = Math.max(0, 3 - Math.floor(Math.log10(size)));
  return x.toFixed(Math.min(digits, 6)).replace(/\.?0+$/, "").replace("-", MINUS);
}
function duration(seconds) {
  if (!isNumber(seconds)) return "\u2013";
  const s = Math.round(seconds);
  const [h, m] = [Math.floor(s / 3600), Math.floor((s % 3600) / 60)];
  if (h) return `${h} h ${m} min`;
  return m ? `${m} min ${s % 60} s` : `${s} s`;
}
const percent = (x) => fixed(x, 1);
const colour = (k) => `var(--c${((k % 8) + 8) % 8})`;
const isTrained = (phase) => phase.algorithm !== "sft";
const expand = (runs) => runs.flatMap(([value, count]) => Array(count).fill(value));

function section(id, title, lead, ...children) {
  return el("section", { id, "aria-labelledby": id + "-h" },
    el("div", { class: "head" }, el("h2", { id: id + "-h" }, title), lead ? el("p", {}, lead) : null), children);
}
// a list of buttons of which one is chosen; arrow keys move, Home and End jump
function chooser(labels, label, onchoose, kind) {
  const isTabs = kind !== "strip";
  const box = el("div", { class: isTabs ? "tabs" : "strip", role: isTabs ? "tablist" : "group", "aria-label": label });
  const state = isTabs ? "aria-selected" : "aria-pressed";
  const buttons = labels.map((content, i) => el("button", {
    type: "button", role: isTabs ? "tab" : null, [state]: "false", tabindex: "-1", onclick: () => choose(i),
  }, content));
  box.append(...buttons);
  let chosen = -1;
  function choose(i, quiet) {
    chosen = i;
    buttons.forEach((b, n) => { b.setAttribute(state, String(n === i)); b.tabIndex = n === i ? 0 : -1; });
    if (!quiet) onchoose(i);
  }
  box.addEventListener("keydown", (event) => {
    const to = { ArrowRight: chosen + 1, ArrowLeft: chosen - 1, Home: 0, End: buttons.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    choose((to + buttons.length) % buttons.length);
    buttons[chosen].focus();
  });
  return { box, choose };
}
// a slider over a list of steps with buttons on both sides
function stepper(steps, label, onstep) {
  const input = el("input", { type: "range", min: 0, max: Math.max(0, steps.length - 1), step: 1, "aria-label": label });
  const output = el("output", { class: "num" });
  const back = el("button", { type: "button", class: "plain", "aria-label": "earlier", onclick: () => set(+input.value - 1) }, "\u2190");
  const on = el("button", { type: "button", class: "plain", "aria-label": "later", onclick: () => set(+input.value + 1) }, "\u2192");
  function set(i, quiet) {
    const at = Math.min(Math.max(i, 0), steps.length - 1);
    input.value = at;
    input.setAttribute("aria-valuetext", `step ${steps[at]}`);
    output.textContent = `step ${steps[at]}`;
    back.disabled = at === 0;
    on.disabled = at === steps.length - 1;
    if (!quiet) onstep(at);
  }
  input.addEventListener("input", () => set(+input.value));
  return { box: el("div", { class: "slider controls" }, back, input, on, output), set };
}
