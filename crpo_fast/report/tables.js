// The before/after table with a dumbbell per data set, several runs side by side, confusion matrices, setup.
function cell(label, main, low, high, extra) {
  const ci = isNumber(low) ? el("span", { class: "ci" }, `${fixed(low)} to ${fixed(high)}`) : null;
  return el("td", { "data-label": label, class: extra }, main, ci);
}
function dumbbell(before, after) {
  const x = (v) => 6 + (v / 100) * 218, svg = sv("svg", { class: "bell", viewBox: "0 0 230 26", role: "img", "aria-label": `before ${fixed(before && before.weighted_f1)}, after ${fixed(after && after.weighted_f1)}` });
  svg.append(sv("line", { x1: x(0), x2: x(100), y1: 13, y2: 13, stroke: "var(--line)" }));
  const whisker = (c, y, color) => c && isNumber(c.low) && svg.append(sv("line", { x1: x(c.low), x2: x(c.high), y1: y, y2: y, stroke: color, "stroke-width": 1.5 }));
  whisker(before, 21, "var(--faint)");
  whisker(after, 5, "var(--accent)");
  if (before && after) svg.append(sv("line", { x1: x(before.weighted_f1), x2: x(after.weighted_f1), y1: 13, y2: 13, stroke: "var(--accent)", "stroke-width": 3, opacity: 0.45 }));
  if (before) svg.append(sv("circle", { cx: x(before.weighted_f1), cy: 13, r: 4.5, fill: "var(--bg)", stroke: "var(--faint)", "stroke-width": 2 }));
  if (after) svg.append(sv("circle", { cx: x(after.weighted_f1), cy: 13, r: 5, fill: "var(--accent)" }));
  return svg;
}
const tone = (value) => (!isNumber(value) || Math.abs(value) < 0.05 ? "" : value > 0 ? "up" : "down");
// a change is coloured only where its interval leaves 0 out
const changeTone = (c) => (!c || (isNumber(c.low) && c.low <= 0 && c.high >= 0) ? "" : tone(c.value));

function resultTable(run) {
  const { columns, rows } = run.table;
  if (!columns.length) return el("p", { class: "notice" }, "No evaluation has been made yet.");
  const both = columns.includes("before") && columns.includes("after");
  const axis = el("span", { class: "axis" }, el("span", {}, "0"), el("span", {}, "weighted F1, %"), el("span", {}, "100"));
  const head = el("tr", {}, ["data set", "rows", ...columns.map((c) => `F1 ${c}`), ...(both ? ["change"] : []), "well formed"].map((t) => el("th", { scope: "col" }, t)), el("th", { scope: "col" }, axis));
  const body = rows.map((row) => el("tr", { class: row.name === "average" && rows.length > 1 ? "sum" : null },
    el("td", {}, row.name), el("td", { "data-label": "rows" }, row.rows),
    columns.map((c) => (row.cells[c] ? cell(`F1 ${c}`, percent(row.cells[c].weighted_f1), row.cells[c].low, row.cells[c].high) : cell(`F1 ${c}`, "\u2013"))),
    both ? (row.change ? el("td", { "data-label": "change", class: changeTone(row.change) }, signed(row.change.value), isNumber(row.change.low) ? el("span", { class: "ci" }, `${signed(row.change.low)} to ${signed(row.change.high)}`) : null) : cell("change", "\u2013")) : null,
    cell("well formed", columns.map((c) => (row.cells[c] ? percent(row.cells[c].format_rate) : "\u2013")).join(" \u2192 ")),
    el("td", { class: "plot", "data-label": "before and after, 0 to 100" }, dumbbell(row.cells.before, row.cells.after))));
  return el("div", {}, el("div", { class: "wide" }, el("table", { class: "stack", id: ONE ? "scores" : null }, el("thead", {}, head), el("tbody", {}, body))),
    el("p", { class: "keyline" }, el("span", {}, "\u25cb before"), el("span", {}, "\u25cf after"), el("span", {}, "small numbers: 95 % bootstrap interval over rows; of the change: paired, both scored on the same draws")), allScores(run));
}
function allScores(run) {
  const keys = [["weighted_f1", "weighted F1"], ["accuracy", "accuracy"], ["macro_f1", "macro F1"], ["format_rate", "format"], ["parse_rate", "parseable"]];
  const body = run.table.rows.flatMap((row) => run.table.columns.map((c) => row.cells[c] && el("tr", {}, el("td", {}, row.name), cell("when", c), keys.map(([k, t]) => cell(t, percent(row.cells[c][k]))))));
  return el("details", {}, el("summary", {}, "All scores"), el("table", { class: "stack" }, el("thead", {}, el("tr", {}, ["data set", "when", ...keys.map((k) => k[1])].map((t) => el("th", { scope: "col" }, t)))), el("tbody", {}, body)));
}
function comparison() {
  const last = (run) => run.table.rows[run.table.rows.length - 1] || { cells: {} };
  const head = ["run", "seed", "steps", "F1 before", "F1 after", "change", "format after", "time"];
  const body = RUNS.map((run, i) => {
    const { cells, change } = last(run);
    const score = (label, c) => (c ? cell(label, percent(c.weighted_f1), c.low, c.high) : cell(label, "\u2013"));
    return el("tr", {}, el("td", {}, el("span", { style: `color:${colour(i)}` }, "\u25cf "), run.name, run.finished ? null : el("span", { class: "soft" }, " (unfinished)")),
      cell("seed", run.seed), cell("steps", run.steps), score("F1 before", cells.before), score("F1 after", cells.after),
      el("td", { "data-label": "change", class: changeTone(change) }, change ? signed(change.value) : "\u2013", change && isNumber(change.low) ? el("span", { class: "ci" }, `${signed(change.low)} to ${signed(change.high)}`) : null),
      cell("format after", cells.after ? percent(cells.after.format_rate) : "\u2013"), cell("time", duration(run.seconds)));
  });
  return el("table", { class: "stack", id: "comparison" }, el("thead", {}, el("tr", {}, head.map((t) => el("th", { scope: "col" }, t)))), el("tbody", {}, body));
}
function resultSection() {
  const children = ONE ? [resultTable(RUNS[0])] : [comparison(), RUNS.map((run) => el("details", {}, el("summary", {}, `Data sets of ${run.name}`), resultTable(run)))];
  return section("result", "Result", "Weighted F1 and format rate on held-out rows, greedy decoding, percent.", children);
}

// before and after in one table; columns have the numbers of the rows' labels
function matrix(entry, kinds, none) {
  const labels = [...entry.labels, ...(none ? ["no label"] : [])];
  const gap = (tag) => el(tag, { class: "gap" });
  const spread = (make) => kinds.map((kind, n) => [n ? gap(make.tag || "td") : null, make(kind)]);
  const heads = spread(Object.assign((kind) => el("th", { colspan: labels.length, scope: "colgroup" }, kind), { tag: "td" }));
  const numbers = spread(() => labels.map((label, j) => el("th", { scope: "col", title: label }, j < entry.labels.length ? j + 1 : "none")));
  const rows = entry.labels.map((label, i) => el("tr", {}, el("th", { scope: "row", class: label.includes(" ") ? null : "one" }, el("i", {}, i + 1), label), spread((kind) => {
    const counts = entry[kind][i], total = counts.reduce((a, b) => a + b, 0);
    return labels.map((answer, j) => {
      const share = total ? counts[j] / total : 0;
      return el("td", { vars: { "--p": share.toFixed(3) }, class: `${share > 0.6 ? "strong" : ""} ${i === j ? "hit" : ""}`, title: `${kind}: gold ${label}, answered ${answer}: ${counts[j]} of ${total}` }, counts[j]);
    });
  })));
  return el("table", { class: "mat" }, el("thead", {}, el("tr", {}, gap("td"), heads), el("tr", {}, gap("td"), numbers)), el("tbody", {}, rows));
}
function confusionSection() {
  const blocks = RUNS.flatMap((run) => run.confusions.map((entry) => {
    const kinds = ["before", "after"].filter((k) => entry[k]);
    const none = kinds.some((k) => entry[k].some((row) => row[row.length - 1] > 0));
    return el("div", {}, el("h3", {}, ONE ? entry.name : `${entry.name}, ${run.name}`), el("div", { class: "wide" }, matrix(entry, kinds, none)), none ? el("p", { class: "small faint" }, "none: the answer names no label") : null);
  }));
  if (!blocks.length) return null;
  return section("confusion", "Confusion", "Rows: gold label; columns: the answer, by its number; cells: how many posts; shade: share of the row; outlined: correct. Where there is no column \"none\", every answer named a label.", el("div", { class: "mats" }, blocks));
}

const shown = (value) => (value === null || value === undefined ? "\u2013" : typeof value === "string" ? value || '""' : JSON.stringify(value));
function pairs(entries) {
  return el("dl", { class: "kv" }, entries.filter(([, v]) => v !== null && v !== undefined && v !== "").map(([k, v]) => [el("dt", {}, k), el("dd", {}, v)]));
}
function setupOf(run) {
  const first = run.starts[0] || {}, last = run.starts[run.starts.length - 1] || {};
  const later = run.starts.slice(1).map((s) => `step ${s.step} (${s.time})`).join(", ");
  return el("div", {}, ONE ? null : el("h3", {}, run.name), pairs([
    ["folder", el("span", { class: "mono" }, run.folder)],
    ["command", last.command && el("span", { class: "mono" }, last.command)],
    ["seed", run.seed], ["started", first.time], ["continued from", later], ["ranks", last.ranks], ["threads", last.threads], ["machine", last.machine], ["commit", last.commit || null],
    ["versions", last.versions && Object.entries(last.versions).map(([k, v]) => `${k} ${v}`).join(", ")],
  ]));
}
function setupSection() {
  const keys = ONE ? RUNS[0].config.map((c) => c.key) : [...new Set(RUNS.flatMap((r) => r.config.map((c) => c.key)))].filter((key) => new Set(RUNS.map((r) => JSON.stringify((r.config.find((c) => c.key === key) || {}).value))).size > 1);
  const value = (run, key) => { const found = run.config.find((c) => c.key === key); return found ? shown(found.value) : "default"; };
  const head = ONE ? ["key", "value", "default"] : ["key", ...RUNS.map((r) => r.name)];
  const body = keys.map((key) => el("tr", {}, el("td", { class: "mono" }, key), RUNS.map((run) => el("td", { class: "mono", "data-label": ONE ? "value" : run.name }, value(run, key))),
    ONE ? el("td", { class: "mono soft", "data-label": "default" }, shown(RUNS[0].config.find((c) => c.key === key).default)) : null));
  const config = el("table", { class: "config stack", id: "config" }, el("thead", {}, el("tr", {}, head.map((t) => el("th", { scope: "col" }, t)))), el("tbody", {}, body));
  const title = ONE ? "Keys that differ from the defaults" : "Keys that differ between the runs";
  return section("setup", "What was run", null, el("div", { class: "cols" }, el("div", {}, RUNS.map(setupOf)), el("div", {}, el("h3", {}, title), keys.length ? config : el("p", { class: "soft" }, "none"))));
}
