// The page from top to bottom.
function headline(run) {
  const row = run.table.rows[run.table.rows.length - 1];
  if (!row) return null;
  const { before, after } = row.cells, last = after || before || row.cells.untrained;
  if (!last) return null;
  const interval = (c) => (c && isNumber(c.low) ? `${fixed(c.low)} to ${fixed(c.high)}` : null);
  const text = before && after
    ? ["weighted F1, before and after", interval(before) && `; 95 % intervals ${interval(before)} and ${interval(after)}`]
    : ["weighted F1", interval(last) && `; 95 % interval ${interval(last)}`];
  return el("div", {}, el("div", { class: "big", id: "headline" }, before && after ? [el("span", { class: "from" }, percent(before.weighted_f1)), el("span", { class: "arrow" }, "\u2192")] : null, el("span", {}, percent(last.weighted_f1))), el("p", { class: "cap" }, text));
}
function rewards(run) {
  const all = points(run, "reward", isTrained).map((p) => p[1]).filter(isNumber);
  if (!all.length) return null;
  const quarter = Math.max(1, Math.floor(all.length / 4)), mean = (xs) => xs.reduce((a, b) => a + b, 0) / xs.length;
  return [mean(all.slice(0, quarter)), mean(all.slice(-quarter))];
}
function tiles(run) {
  const row = run.table.rows[run.table.rows.length - 1], after = row && (row.cells.after || row.cells.before), reward = rewards(run);
  const speed = points(run, "tokens_per_second", isTrained).map((p) => p[1]).filter(isNumber).sort((a, b) => a - b);
  const tile = (value, text) => el("div", { class: "tile" }, el("b", {}, value), el("span", {}, text));
  return el("div", { class: "tiles" },
    row && row.change ? el("div", { class: "tile" }, el("b", { class: changeTone(row.change) }, signed(row.change.value)), el("span", {}, isNumber(row.change.low) ? `points (${signed(row.change.low)} to ${signed(row.change.high)})` : "points")) : null,
    reward ? tile(`${fixed(reward[0], 2)} \u2192 ${fixed(reward[1], 2)}`, "mean reward, first and last quarter") : null,
    after ? tile(`${percent(after.format_rate)} %`, "well formed") : null,
    speed.length ? tile(short(speed[Math.floor(speed.length / 2)]), "tokens/s, median step") : null);
}
function top() {
  const run = RUNS[0];
  const kinds = [...new Set(RUNS.flatMap((r) => r.curves.phases.map((p) => p.algorithm)))].join(", then ");
  const unfinished = RUNS.filter((r) => !r.finished);
  const facts = ONE
    ? [kinds, `${run.steps} steps`, duration(run.seconds), `seed ${run.seed}`, run.stages.length ? `${run.stages.length} stages` : null]
    : [`${RUNS.length} runs`, kinds];
  const state = unfinished.map((r) => el("p", { class: "notice" }, `${ONE ? "This run" : r.name} is not finished: ${r.steps} of ${r.planned || "?"} steps are done.`));
  const troubles = RUNS.flatMap((r) => Object.entries(r.totals).map(([text, n]) => `${ONE ? "" : r.name + ": "}${short(n)} ${text}`));
  return el("header", { class: "top" }, el("p", { class: "eyebrow" }, "crpo-fast report"), el("h1", {}, RUNS.map((r) => r.name).join(" \u00b7 ")),
    el("p", { class: "facts" }, facts.filter(Boolean).map((f) => el("span", {}, f))), state,
    troubles.length ? el("p", { class: "notice" }, troubles.join("; ")) : null,
    ONE ? el("div", { class: "hero" }, headline(run), tiles(run)) : null);
}
function bar(sections) {
  const isDark = () => (document.documentElement.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const label = () => (isDark() ? "Light" : "Dark");
  const button = el("button", { type: "button", class: "plain", id: "theme", "aria-label": "switch between light and dark" }, label());
  button.addEventListener("click", () => { document.documentElement.dataset.theme = isDark() ? "light" : "dark"; button.textContent = label(); });
  return el("div", { class: "bar" }, el("div", { class: "wrap" }, el("nav", { "aria-label": "sections" }, sections.map((s) => el("a", { href: "#" + s.id }, s.querySelector("h2").textContent))), button));
}
function foot() {
  const notes = RUNS.flatMap((run) => run.notes.map((note) => el("li", {}, ONE ? note : `${run.name}: ${note}`)));
  return el("footer", {}, notes.length ? [el("p", {}, "Not on this page:"), el("ul", { id: "notes" }, notes), el("br", {})] : null,
    el("p", {}, `Made ${DATA.made} from ${RUNS.map((r) => r.folder).join(", ")}. One file; nothing was loaded from any network. Research software, no clinical instrument.`));
}
const sections = [resultSection(), curvesSection(), confusionSection(), tracesSection(), setupSection()].filter(Boolean);
document.getElementById("page").replaceWith(bar(sections), el("main", { class: "wrap" }, top(), sections, foot()), tip);
