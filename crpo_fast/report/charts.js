// Line charts that share an x axis: one crosshair for all charts of a group, values on hover, tap and keys.
const W = 360, LEFT = 42, TOP = 8, PLOT = 118, STRIP = 30;

class Group {
  constructor() { this.charts = []; this.steps = []; this.at = null; }
  add(chart) {
    this.charts.push(chart);
    this.steps = [...new Set([...this.steps, ...chart.steps])].sort((a, b) => a - b);
  }
  range() { return [this.steps[0], this.steps[this.steps.length - 1]]; }
  draw() { for (const chart of this.charts) chart.draw(this); }
  show(step) {
    this.at = step;
    for (const chart of this.charts) chart.mark(step);
  }
  move(by, from) {
    const last = this.steps.length - 1;
    const now = this.at === null ? (by > 0 ? -1 : last + 1) : this.steps.indexOf(this.at);
    this.show(this.steps[Math.min(last, Math.max(0, by === null ? from : now + by))]);
  }
}

function ticks(low, high, wanted) {
  const raw = (high - low) / wanted, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw * 0.999);
  const found = [];
  for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + step * 1e-6; v += step) found.push(Math.abs(v) < step / 1e6 ? 0 : v);
  return found;
}
function extent(values, zero) {
  let low = Math.min(...values), high = Math.max(...values);
  if (!values.length) [low, high] = [0, 1];
  if (zero || (low >= 0 && low <= high * 0.6)) low = Math.min(0, low);
  if (high - low < 1e-12 * Math.max(1e-3, Math.abs(high))) [low, high] = high === 0 ? [0, 1] : [Math.min(0, high * 1.2), Math.max(0, high * 1.2)];
  const pad = (high - low) * 0.05;
  return [low === 0 ? 0 : low - pad, high + pad];
}
const near = (points, step) => points.find((p) => p[0] === step);

class Chart {
  // spec: {title, unit, series: [{name, color, points: [[step, value, low, high]], dots, dash}], strip, band, caption, zero}
  constructor(spec) {
    this.spec = spec;
    this.right = spec.series.length > 1 ? 76 : 14;
    this.steps = [...new Set(spec.series.flatMap((s) => s.points.map((p) => p[0])))].sort((a, b) => a - b);
    this.height = TOP + PLOT + (spec.strip ? STRIP + 10 : 0) + 18;
    this.out = el("output", {});
    this.svg = sv("svg", { viewBox: `0 0 ${W} ${this.height}`, tabindex: "0", role: "img" });
    const isLong = spec.series.length > 1 || spec.strip || spec.band;
    this.node = el("figure", { class: "chart" }, el("div", { class: "name" }, el("span", {}, spec.title), isLong ? null : this.out), this.svg, isLong ? this.out : null,
      spec.caption ? el("figcaption", {}, spec.caption) : null);
  }
  draw(group) {
    const { spec } = this;
    const [x0, x1] = group.range();
    this.x = (step) => LEFT + (x1 === x0 ? 0.5 : (step - x0) / (x1 - x0)) * (W - LEFT - this.right);
    const values = spec.series.flatMap((s) => s.points.flatMap((p) => p.slice(1))).concat((spec.band || []).flatMap((b) => b.slice(1))).filter(isNumber);
    const [low, high] = extent(values, spec.zero);
    this.y = (v) => TOP + PLOT - ((v - low) / (high - low)) * PLOT;
    const bottom = TOP + PLOT;
    for (const v of ticks(low, high, 3)) {
      this.svg.append(sv("line", { class: v === 0 ? "zero" : "grid-line", x1: LEFT, x2: W - this.right, y1: this.y(v), y2: this.y(v) }),
        sv("text", { x: LEFT - 6, y: this.y(v) + 4, "text-anchor": "end" }, short(v)));
    }
    if (spec.band) this.area(spec.band, "var(--faint)", 0.16);
    for (const s of spec.series) this.line(s);
    if (spec.strip) this.drawStrip(spec.strip, bottom + 10);
    const base = this.height - 5;
    const marks = x1 === x0 ? [x0] : [x0, ...ticks(x0, x1, 4).filter((t) => t > x0 + (x1 - x0) * 0.14 && t < x1 - (x1 - x0) * 0.14), x1];
    for (const t of marks) this.svg.append(sv("text", { x: this.x(t), y: base, "text-anchor": t === x0 && x1 > x0 ? "start" : t === x1 && x1 > x0 ? "end" : "middle" }, short(t)));
    this.labels();
    this.over = sv("g", {});
    this.svg.append(this.over);
    this.svg.setAttribute("aria-label", this.describe() + " Arrow keys read the values.");
    this.listen(group);
    this.mark(null);
  }
  line(s) {
    if (s.points.some((p) => isNumber(p[2])) && !s.dots) this.area(s.points.map((p) => [p[0], p[2], p[3]]), s.color, 0.18);
    let path = "", open = false;
    for (const [step, value] of s.points) {
      if (!isNumber(value)) { open = false; continue; }
      path += `${open ? "L" : "M"}${this.x(step).toFixed(1)} ${this.y(value).toFixed(1)}`;
      open = true;
    }
    this.svg.append(sv("path", { class: "ln", d: path, stroke: s.color, "stroke-dasharray": s.dash || null }));
    const known = s.points.filter((p) => isNumber(p[1]));
    if (!s.dots && known.length > 1) return;
    for (const [step, value, low, high] of known) {
      const x = this.x(step);
      if (isNumber(low)) this.svg.append(sv("line", { x1: x, x2: x, y1: this.y(low), y2: this.y(high), stroke: s.color, "stroke-width": 1, opacity: 0.6 }));
      this.svg.append(sv("circle", { cx: x, cy: this.y(value), r: 2.6, fill: s.color }));
    }
  }
  area(points, color, opacity) {
    const known = points.filter((p) => isNumber(p[1]) && isNumber(p[2]));
    if (!known.length) return;
    const at = (p, i) => `${this.x(p[0]).toFixed(1)},${this.y(p[i]).toFixed(1)}`;
    const outline = [...known.map((p) => at(p, 2)), ...known.reverse().map((p) => at(p, 1))].join(" ");
    this.svg.append(sv("polygon", { points: outline, fill: color, opacity }));
  }
  // the coefficient below the entropy: above the line it penalises (commit), below it rewards (explore)
  drawStrip(strip, top) {
    const known = strip.points.filter((p) => isNumber(p[1]));
    const most = Math.max(1e-9, strip.most, ...known.map((p) => Math.abs(p[1])));
    const middle = top + STRIP / 2, y = (v) => middle - (v / most) * (STRIP / 2 - 2);
    this.svg.append(sv("line", { class: "zero", x1: LEFT, x2: W - this.right, y1: middle, y2: middle }),
      sv("text", { x: LEFT - 6, y: middle + 4, "text-anchor": "end" }, "\u03b2"));
    const wide = known.length > 1 ? Math.max(1.2, (this.x(known[1][0]) - this.x(known[0][0])) * 0.72) : 6;
    for (const [step, v] of known) {
      this.svg.append(sv("rect", { x: this.x(step) - wide / 2, width: wide, y: Math.min(y(v), middle), height: Math.max(0.6, Math.abs(y(v) - middle)), fill: strip.color, opacity: 0.75 }));
    }
  }
  labels() {
    if (this.spec.series.length < 2) return;
    const ends = this.spec.series.map((s) => ({ s, last: s.points.filter((p) => isNumber(p[1])).pop() })).filter((e) => e.last)
      .map((e) => ({ ...e, y: this.y(e.last[1]) + 4 })).sort((a, b) => a.y - b.y);
    ends.forEach((e, i) => { if (i) e.y = Math.max(e.y, ends[i - 1].y + 12.5); });
    const over = ends.length ? ends[ends.length - 1].y - (TOP + PLOT + 6) : 0;
    if (over > 0) ends.forEach((e) => { e.y -= over; });
    for (const e of ends) {
      this.svg.append(sv("text", { class: "lab", x: W - this.right + 6, y: e.y, style: `fill:color-mix(in srgb, ${e.s.color} 72%, var(--ink))` }, e.s.name.length > 12 ? e.s.name.slice(0, 11) + "\u2026" : e.s.name, sv("title", {}, e.s.name)));
    }
  }
  describe() {
    const parts = this.spec.series.map((s) => {
      const known = s.points.filter((p) => isNumber(p[1]));
      return known.length ? `${s.name}: from ${short(known[0][1])} at step ${known[0][0]} to ${short(known[known.length - 1][1])} at step ${known[known.length - 1][0]}.` : `${s.name}: no values.`;
    });
    return `${this.spec.title}${this.spec.unit ? ", " + this.spec.unit : ""}. ${parts.join(" ")}`;
  }
  mark(step) {
    this.over.replaceChildren();
    const at = step === null ? this.steps[this.steps.length - 1] : step;
    const rows = this.spec.series.map((s) => ({ s, p: near(s.points, at) })).filter((r) => r.p && isNumber(r.p[1]));
    if (step !== null) {
      const x = this.x(step);
      this.over.append(sv("line", { class: "cross", x1: x, x2: x, y1: TOP, y2: this.height - 18 }));
      for (const { s, p } of rows) this.over.append(sv("circle", { cx: x, cy: this.y(p[1]), r: 3.2, fill: s.color, stroke: "var(--bg)", "stroke-width": 1.5 }));
    }
    const unit = this.spec.unit ? ` ${this.spec.unit}` : "";
    const alone = this.spec.series.length === 1;
    const text = rows.map(({ s, p }) => {
      const value = short(p[1]) + (alone && isNumber(p[2]) ? ` (${short(p[2])} to ${short(p[3])})` : "");
      return alone ? value + unit : `${s.name} ${value}`;
    });
    const strip = this.spec.strip && near(this.spec.strip.points, at);
    if (strip && isNumber(strip[1])) text.push(`\u03b2 ${short(strip[1])}`);
    this.out.textContent = rows.length ? `${text.join(", ")} at ${at}` : step === null ? "" : `no value at ${at}`;
  }
  listen(group) {
    const to = (event) => {
      const box = this.svg.getBoundingClientRect();
      const px = ((event.clientX - box.left) / box.width) * W;
      let best = null;
      for (const step of group.steps) if (best === null || Math.abs(this.x(step) - px) < Math.abs(this.x(best) - px)) best = step;
      group.show(best);
    };
    this.svg.addEventListener("pointermove", to);
    this.svg.addEventListener("pointerdown", to);
    this.svg.addEventListener("pointerleave", () => group.show(null));
    this.svg.addEventListener("blur", () => group.show(null));
    this.svg.addEventListener("keydown", (event) => {
      const by = { ArrowRight: 1, ArrowLeft: -1, PageUp: 10, PageDown: -10 }[event.key];
      if (by !== undefined) group.move(by);
      else if (event.key === "Home") group.move(null, 0);
      else if (event.key === "End") group.move(null, group.steps.length - 1);
      else if (event.key === "Escape") group.show(null);
      else return;
      event.preventDefault();
    });
  }
}

// points of a metric over the phases that `keep` keeps: [step, mean, min, max]
function points(run, key, keep) {
  return run.curves.phases.filter(keep).flatMap((phase) => {
    const s = phase.series[key];
    return s ? phase.steps.map((step, i) => s.min ? [step, s.mean[i], s.min[i], s.max[i]] : [step, s.mean[i]]) : [];
  });
}
const names = (keep) => [...new Set(RUNS.flatMap((run) => run.curves.phases.filter(keep).flatMap((p) => Object.keys(p.series))))];

// one chart: several metrics of one run, or one metric of several runs
function metricChart(title, keys, keep, more) {
  const series = ONE
    ? keys.map(([key, name], i) => ({ name, color: colour(i), points: points(RUNS[0], key, keep) }))
    : RUNS.map((run, i) => ({ name: run.name, color: colour(i), points: points(run, keys[0][0], keep) }));
  const drawn = series.filter((s) => s.points.some((p) => isNumber(p[1])));
  return drawn.length ? new Chart({ title, series: drawn, ...more }) : null;
}
// of all seconds of the steps, those of one part
function share(run, key, keep) {
  const sum = (name) => points(run, name, keep).reduce((total, p) => total + (p[1] || 0), 0);
  return sum(key) / Math.max(1e-9, sum("seconds/step"));
}
// parts of one thing: one chart of one run, a chart per part of several runs
function together(title, keys, keep, more) {
  return ONE ? metricChart(title, keys, keep, more) : keys.map(([key, name]) => metricChart(`${title}, ${name}`, [[key, name]], keep));
}
function addCharts(box, group, charts) {
  const found = charts.flat().filter(Boolean);
  if (!found.length) return null;
  for (const chart of found) group.add(chart);
  const grid = el("div", { class: "grid" }, found.map((chart) => chart.node));
  box.append(grid);
  return grid;
}

function stageCharts(keep) {
  const longest = RUNS.reduce((a, r) => (r.stages.length > a.length ? r.stages : a), []);
  const most = Math.max(0, ...RUNS.flatMap((run) => longest.flatMap((_, k) => points(run, `stage_coef/${k}`, keep).map((p) => Math.abs(p[1] || 0)))));
  return longest.map((stage, k) => {
    const coefs = points(RUNS[0], `stage_coef/${k}`, keep);
    const targets = ONE ? points(RUNS[0], `stage_target/${k}`, keep).filter((p) => isNumber(p[1])) : [];
    const hasStrip = ONE && coefs.some((p) => isNumber(p[1]) && p[1] !== 0);
    const chart = metricChart(`${k + 1} ${stage}`, [[`stage_entropy/${k}`, "entropy"]], keep, {
      unit: "nats", zero: true, strip: hasStrip ? { points: coefs, color: colour(k), most } : null,
      band: targets.length ? targets.map((p) => [p[0], p[1] / 2, p[1] * 2]) : null,
      caption: hasStrip ? pressure(k, coefs, keep) : null,
    });
    if (chart && ONE) chart.spec.series[0].color = colour(k);
    if (chart && targets.length) {
      chart.spec.series.push({ name: "target", color: "var(--faint)", dash: "4 3", points: targets.map((p) => [p[0], p[1]]) });
      chart.right = 76;
    }
    return chart;
  });
}
// beta_k / |T_k|: what one token of the stage feels
function pressure(k, coefs, keep) {
  const tokens = points(RUNS[0], `stage_tokens/${k}`, keep).filter((p) => p[1] > 0).pop();
  const last = coefs.filter((p) => isNumber(p[1])).pop();
  const what = last[1] > 0 ? "penalises entropy (commit)" : "rewards entropy (explore)";
  if (!tokens) return what;
  const reference = RUNS[0].reference_length;
  const scale = reference ? Math.min(1, tokens[1] / reference) : 1;
  const brief = (x) => short(Number(x.toPrecision(2)));
  return `${what}; ${brief(tokens[1])} tokens, \u03b2/|T| ${brief((last[1] * scale) / tokens[1])}${reference ? ` with reference_length ${reference}` : ""}`;
}
function scoreChart() {
  const series = RUNS.map((run, i) => ({
    name: run.name, color: colour(i), dots: true,
    points: run.history.filter((h) => h.name !== "untrained").map((h) => [h.step, h.f1, h.low, h.high]),
  })).filter((s) => s.points.length);
  return series.length ? new Chart({ title: "Weighted F1", series, caption: "held-out rows, greedy, with 95 % bootstrap intervals" }) : null;
}

function curvesSection() {
  const box = el("div", {});
  const keep = RUNS.some((run) => run.curves.phases.some(isTrained)) ? isTrained : () => true;
  const group = new Group();
  const known = names(keep);
  const parts = known.filter((n) => /^reward\/.*_reward$/.test(n)).map((n) => [n, n.slice(7).replace(/_reward$/, "")]);
  addCharts(box, group, [
    metricChart("Reward", [["reward", "total"], ...parts], keep),
    scoreChart(),
    metricChart("KL to the reference", [["kl", "KL"]], keep, { unit: "nats" }),
  ]);
  const stages = stageCharts(keep);
  if (stages.some(Boolean)) {
    box.append(el("p", { class: "group-title" }, ONE ? "Entropy of each stage, and its coefficient \u03b2 below" : "Entropy of each stage"));
    addCharts(box, group, stages);
  }
  box.append(el("p", { class: "group-title" }, "Optimisation and speed"));
  const speeds = known.filter((n) => n.startsWith("tokens_per_second/")).map((n) => [n, n.slice(18)]);
  const seconds = known.filter((n) => n.startsWith("seconds/") && n !== "seconds/step").map((n) => [n, n.slice(8)])
    .filter(([n]) => RUNS.some((run) => share(run, n, keep) >= 0.01));
  addCharts(box, group, [
    metricChart("Clip fraction", [[known.includes("clip_fraction") ? "clip_fraction" : "is_clipped", "clipped"]], keep, { zero: true }),
    metricChart("Gradient norm", [["grad_norm", "norm"]], keep),
    metricChart("Train/rollout mismatch", [["mismatch", "mean |\u0394 logprob|"]], keep, { unit: "nats" }),
    metricChart("Completion length", [["completions/length", "tokens"]], keep, { unit: "tokens" }),
    metricChart("Loss", [["loss", "loss"]], keep),
    together("Tokens per second", speeds.length ? speeds : [["tokens_per_second", "whole step"]], keep),
    together("Seconds of a step", seconds, keep, { caption: "parts of less than 1 % are among the other metrics" }),
  ]);
  group.draw();
  coldStart(box, keep);
  otherCurves(box, keep, known, new Set(["reward", "kl", "clip_fraction", "is_clipped", "grad_norm", "mismatch", "completions/length", "loss", "tokens_per_second", "seconds", "seconds/step", ...parts.map((p) => p[0]), ...speeds.map((p) => p[0]), ...seconds.map((p) => p[0])]));
  const width = Math.max(...RUNS.map((run) => run.curves.width));
  const lead = "Every chart of a group shares the step axis: hover, tap, or focus one and use the arrow keys."
    + (width > 1 ? ` Long run: a point is the mean of ${width} steps, the band their smallest and largest value.` : "");
  return section("curves", "Curves", lead, box);
}
function coldStart(box, keep) {
  if (keep !== isTrained) return;
  const sft = (phase) => !isTrained(phase), group = new Group(), inner = el("div", {});
  if (!addCharts(inner, group, [
    metricChart("Loss", [["loss", "loss"]], sft), metricChart("Gradient norm", [["grad_norm", "norm"]], sft), metricChart("Tokens per second", [["tokens_per_second", "tokens/s"]], sft),
  ])) return;
  box.append(el("p", { class: "group-title" }, "Cold start (supervised)"), inner);
  group.draw();
}
// all metrics that have no chart above, drawn when they are asked for
function otherCurves(box, keep, known, drawn) {
  const rest = known.filter((n) => !drawn.has(n) && !(ONE ? /^stage_(entropy|coef|target)\// : /^stage_entropy\//).test(n)).sort();
  if (!rest.length) return;
  const inner = el("div", {});
  const details = el("details", {}, el("summary", {}, `All other metrics (${rest.length})`), inner);
  details.addEventListener("toggle", () => {
    if (!details.open || inner.childElementCount) return;
    const group = new Group();
    addCharts(inner, group, rest.map((n) => metricChart(n, [[n, n]], keep)));
    group.draw();
  });
  box.append(details);
}
