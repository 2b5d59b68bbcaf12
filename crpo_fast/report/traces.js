// Completions token by token: rows are stages, shade is entropy, values on hover, tap and keys.
const TAG = /^\s*<[^<>\s]+>\s*$/;
const HIDDEN = /\u2592+/g;
let serial = 0;

const tip = el("div", { id: "tip", role: "status", hidden: true });
let owner = null; // the token that the tip is about
function hideTip() { tip.hidden = true; owner = null; }
function showTip(token, info) {
  const rows = [["stage", info.stage], ["log-probability", `${fixed(info.logprob, 3)} nats`], ["probability", isNumber(info.logprob) ? percent(100 * Math.exp(info.logprob)) + " %" : "\u2013"], ["entropy", `${fixed(info.entropy, 3)} nats`]];
  if (info.weight !== undefined) rows.push(["weight", short(info.weight)]);
  if (isNumber(info.pressure) && info.pressure !== 0) rows.push(["entropy weight", `${short(info.pressure)} (${info.pressure > 0 ? "commit" : "explore"})`]);
  tip.replaceChildren(el("code", {}, JSON.stringify(info.text).slice(1, -1)), el("dl", {}, rows.map(([k, v]) => [el("dt", {}, k), el("dd", {}, v)])));
  tip.hidden = false;
  owner = token;
  placeTip();
}
function placeTip() {
  const token = owner, at = token.getClientRects()[0] || token.getBoundingClientRect(), box = tip.getBoundingClientRect();
  const left = Math.min(Math.max(8, at.left + at.width / 2 - box.width / 2), document.documentElement.clientWidth - box.width - 8);
  const above = at.top - box.height - 8;
  tip.style.left = `${left}px`;
  tip.style.top = `${above > 4 ? above : at.bottom + 8}px`;
}
function pieces(text) {
  const parts = [];
  let end = 0;
  for (const m of text.matchAll(HIDDEN)) {
    parts.push(text.slice(end, m.index), el("span", { class: "hid" }, m[0]));
    end = m.index + m[0].length;
  }
  return [...parts, text.slice(end)];
}
// rows of a completion: a stage with its own tags, or the answer; what is between two stages goes to
// the earlier one up to the first tag that opens, and from there to the later one
function segments(record) {
  const stages = expand(record.stages), parts = [];
  record.tokens.forEach((text, i) => {
    const last = parts[parts.length - 1];
    if (last && last.stage === stages[i]) last.items.push(i);
    else parts.push({ stage: stages[i], items: [i] });
  });
  const opens = (i) => /<(?!\/)/.test(record.tokens[i]) && !/^\s*\//.test(record.tokens[i + 1] || "");
  const rows = [];
  parts.forEach((part, n) => {
    if (part.stage >= 0) {
      rows.push(part);
      return;
    }
    const found = part.items.findIndex(opens), cut = found < 0 ? part.items.length : found;
    if (rows.length) rows[rows.length - 1].items.push(...part.items.splice(0, cut));
    if (parts[n + 1]) parts[n + 1].items.unshift(...part.items);
    else if (part.items.length) rows.push(part);
  });
  return rows.map((row) => ({ ...row, stages: row.items.map((i) => stages[i]) }));
}
// in a well-formed completion the tags say nothing new: brackets stand for them
function shownAs(record, text, isTag, isLast) {
  if (!isTag || record.formed !== true) return pieces(text);
  if (isLast && record.finish === "stop") return "\u220e";
  return /^\s*<\//.test(text) ? "\u27e9" : "\u27e8";
}
function stageName(run, k) { return k >= 0 ? run.stages[k] || `stage ${k + 1}` : "no stage"; }

function tokenBox(run, record, label, full, changes, before) {
  const weights = record.weights && expand(record.weights), pressures = record.pressure && expand(record.pressure);
  const fresh = new Set(), gone = new Map();
  for (const [i, j, k, m] of changes || []) {
    for (let t = k; t < m; t++) fresh.add(t);
    if (j > i) gone.set(k, before.tokens.slice(i, j).join(""));
  }
  const id = `t${serial++}`, tokens = [];
  const removed = (i) => (gone.has(i) && gone.get(i).trim() ? el("del", {}, pieces(gone.get(i))) : null);
  const make = (i, stage) => {
    const text = record.tokens[i], isTag = stage < 0 && TAG.test(text);
    const info = { text, stage: stageName(run, stage), logprob: record.logprobs[i], entropy: record.entropy[i], weight: weights ? weights[i] : undefined, pressure: pressures ? pressures[i] : null };
    const share = Math.min(1, (record.entropy[i] || 0) / full);
    const node = el("span", { id: `${id}-${i}`, class: `tk ${stage >= 0 ? `k${stage % 8} u${stage % 6}` : "none"}${isTag ? " tag" : ""}${fresh.has(i) ? " new" : ""}`, vars: { "--h": share.toFixed(2) }, role: "option", "aria-label": `${text.trim() || "blank"}, ${info.stage}, log-probability ${fixed(info.logprob, 2)}, entropy ${fixed(info.entropy, 2)}` }, shownAs(record, text, isTag, i === record.tokens.length - 1));
    node.addEventListener("pointerenter", (e) => e.pointerType !== "touch" && showTip(node, info));
    node.addEventListener("pointerleave", (e) => e.pointerType !== "touch" && hideTip());
    node.addEventListener("click", () => activate(tokens.findIndex((t) => t.node === node)));
    tokens.push({ node, info });
    return [removed(i), node];
  };
  const rows = segments(record).map((row) => {
    const k = row.stage, isAnswer = k < 0 && row.items.some((i) => /answer/.test(record.tokens[i]));
    const name = k >= 0 ? [el("i", {}, k + 1), stageName(run, k)] : isAnswer ? "answer" : "no stage";
    const spoken = k >= 0 ? stageName(run, k) : isAnswer ? "answer" : "no stage";
    return el("div", { class: `seg ${k >= 0 ? `k${k % 8}` : ""}`, role: "group", "aria-label": spoken }, el("div", { class: "lbl", "aria-hidden": "true" }, name), el("div", { class: "txt", role: "presentation" }, row.items.map((i, n) => make(i, row.stages[n]))));
  });
  const tail = removed(record.tokens.length);
  if (tail) rows.push(el("div", { class: "seg" }, el("div", { class: "lbl" }, ""), el("div", { class: "txt" }, tail)));
  const box = el("div", { class: "toks", role: "listbox", tabindex: "0", "aria-label": `${label}. Arrow keys move from token to token.` }, rows);
  let active = -1;
  function activate(i) {
    if (tokens[active]) tokens[active].node.classList.remove("on");
    active = i;
    const token = tokens[active];
    if (!token) { box.removeAttribute("aria-activedescendant"); return hideTip(); }
    token.node.classList.add("on");
    box.setAttribute("aria-activedescendant", token.node.id);
    if (token.node.scrollIntoViewIfNeeded) token.node.scrollIntoViewIfNeeded(false);
    showTip(token.node, token.info);
  }
  box.addEventListener("keydown", (event) => {
    const to = { ArrowRight: active + 1, ArrowLeft: Math.max(0, active - 1), ArrowDown: active + 8, ArrowUp: Math.max(0, active - 8), Home: 0, End: tokens.length - 1, Escape: -1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    activate(Math.min(to, tokens.length - 1));
  });
  box.addEventListener("blur", () => activate(-1));
  return box;
}
function verdict(record) {
  if (record.answer === null || record.answer === undefined) return el("span", { class: "mark down" }, "\u2715 no answer");
  return el("span", { class: `mark ${record.right ? "up" : "down"}` }, `${record.right ? "\u2713" : "\u2715"} ${record.answer}`);
}
function flags(record) {
  return [record.formed === false ? el("span", { class: "warn" }, "malformed") : null, record.finish === "length" ? el("span", { class: "warn" }, "cut at the longest length") : null];
}
function sampleCard(run, sample, full) {
  const parts = Object.entries(sample.rewards).map(([name, value]) => el("span", {}, `${name.replace(/_reward$/, "")} `, el("b", {}, isNumber(value) ? signed(value, 2) : "none")));
  return el("article", { class: "card" },
    el("div", { class: "who" }, el("span", {}, `prompt ${sample.prompt + 1}, `, el("b", {}, sample.set), el("span", { class: "soft" }, `, gold ${sample.gold}`)), verdict(sample)),
    el("div", { class: "chips" }, el("span", {}, "reward ", el("b", {}, signed(sample.reward, 2))), parts, el("span", {}, "advantage ", el("b", { class: tone(sample.advantage) }, signed(sample.advantage, 2))), flags(sample)),
    sample.post !== undefined ? el("blockquote", { class: "post" }, sample.post) : null,
    tokenBox(run, sample, `Completion for prompt ${sample.prompt + 1}`, full));
}
// the 98th percentile of the entropies: where the shade is full
function fullShade(run) {
  const all = run.traces.steps.flatMap((s) => s.samples.flatMap((x) => x.entropy)).concat(run.probes.prompts.flatMap((p) => p.answers.flatMap((a) => a.entropy))).filter(isNumber).sort((a, b) => a - b);
  return Math.max(0.1, all.length ? all[Math.floor((all.length - 1) * 0.98)] : 1);
}
function legend(run, full) {
  return el("div", { class: "legend" }, run.stages.map((name, k) => el("span", {}, el("span", { class: `tk k${k % 8} u${k % 6}` }, `${k + 1} ${name}`))),
    el("span", { class: "ramp" }, "entropy 0", el("i", {}), `${short(full)} nats and more`), el("span", {}, "\u27e8 \u27e9 tags, \u220e end"));
}
function samplesPanel(run, full) {
  const { steps, recorded } = run.traces;
  if (!steps.length) return el("p", { class: "notice" }, "No completion was recorded (report.trace_every, or no step yet).");
  const cards = el("div", { class: "cards", id: "samples" });
  const control = stepper(steps.map((s) => s.step), "step of the sampled completions", (i) => {
    hideTip();
    cards.replaceChildren(...steps[i].samples.map((sample) => sampleCard(run, sample, full)));
  });
  control.set(steps.length - 1);
  return el("div", {}, el("div", { class: "row" }, control.box),
    el("p", { class: "small soft" }, "Of the first prompts of a step the best and the worst completion by reward.", recorded > steps.length ? ` ${steps.length} of ${recorded} recorded steps are shown, to keep this page small; all are in samples.jsonl.` : ""), el("br", {}), cards);
}
function stageChanges(run, answer) {
  const stages = expand(answer.stages), touched = new Set();
  for (const [, , k, m] of answer.changes) for (let t = k; t < Math.max(m, k + 1); t++) if (stages[t] !== undefined) touched.add(stages[t]);
  const names = [...touched].filter((k) => k >= 0).sort().map((k) => `${k + 1} ${stageName(run, k)}`);
  return names.length ? `changed in: ${names.join(", ")}` : answer.changes.length ? "changed outside the stages" : "unchanged";
}
function probesPanel(run, full) {
  const { prompts, recorded } = run.probes;
  if (!prompts.length) return el("p", { class: "notice" }, "No probe prompt was answered (report.probe_prompts, or no evaluation yet).");
  const holder = el("div", {});
  const show = (n) => {
    const prompt = prompts[n], steps = prompt.answers.map((a) => a.step), card = el("article", { class: "card", id: "probe" });
    const strip = chooser(prompt.answers.map((a) => [el("b", { class: a.answer === null ? "down" : a.right ? "up" : "down" }, `${a.right ? "\u2713" : "\u2715"} ${a.answer === null ? "none" : a.answer}`), a.step]), "answers by step", (i) => control.set(i), "strip");
    const control = stepper(steps, "step of the probe's answer", (i) => {
      hideTip();
      strip.choose(i, true);
      const answer = prompt.answers[i], before = prompt.answers[i - 1];
      const from = !before ? "first answer shown" : before.answer === answer.answer ? `same answer as at step ${before.step}` : `${before.answer || "no answer"} at step ${before.step}, now ${answer.answer || "no answer"}`;
      card.replaceChildren(el("div", { class: "who" }, el("span", {}, el("b", {}, prompt.set), el("span", { class: "soft" }, `, gold ${prompt.gold}`)), verdict(answer)),
        el("div", { class: "chips" }, el("span", {}, from), before ? el("span", { id: "stage-changes" }, stageChanges(run, answer)) : null, flags(answer)),
        prompt.post !== undefined ? el("blockquote", { class: "post" }, prompt.post) : null,
        tokenBox(run, answer, `Answer at step ${answer.step}`, full, answer.changes, before));
    });
    control.set(steps.length - 1);
    holder.replaceChildren(strip.box, el("div", { class: "row" }, control.box), card);
  };
  const picker = chooser(prompts.map((p, i) => `${i + 1} ${p.set}`), "probe prompt", show);
  picker.choose(0);
  const thinned = recorded > prompts[0].answers.length ? ` ${prompts[0].answers.length} of ${recorded} recorded steps are shown, to keep this page small; all are in samples.jsonl.` : "";
  return el("div", {}, el("div", { class: "row" }, picker.box), el("p", { class: "small soft" }, "Fixed prompts of the test split, answered greedily. Since the step shown before: ", el("span", { class: "new" }, "new"), ", ", el("del", {}, "removed"), ".", thinned), el("br", {}), holder);
}
function tracesSection() {
  if (!RUNS.some((run) => run.traces.recorded || run.probes.recorded)) return null;
  const holder = el("div", {});
  const show = (run) => {
    const full = fullShade(run), panel = el("div", { role: "tabpanel", tabindex: "-1" });
    const panels = [() => samplesPanel(run, full), () => probesPanel(run, full)];
    const tabs = chooser(["Sampled completions", "Same prompt, step by step"], "view", (i) => { hideTip(); panel.replaceChildren(panels[i]()); });
    tabs.choose(0);
    holder.replaceChildren(el("div", { class: "controls" }, tabs.box), legend(run, full), panel);
  };
  const picker = ONE ? null : chooser(RUNS.map((run) => run.name), "run", (i) => show(RUNS[i]));
  if (picker) picker.choose(0); else show(RUNS[0]);
  const hidden = DATA.show_text ? "Posts are shown (--show-text)." : "Posts are not in this file, and words that may come from one are blocked out (\u2592); --show-text shows them.";
  return section("traces", "Completions", `A row is a stage, its colour and line are in the legend; the shade is a token's entropy. Hover, tap, or use the arrow keys for its numbers. ${hidden}`, picker ? el("div", { class: "row controls" }, picker.box) : null, holder);
}
document.addEventListener("scroll", () => {
  if (!owner) return;
  const { top, bottom } = owner.getBoundingClientRect();
  tip.hidden = !owner.isConnected || bottom < 0 || top > innerHeight; // it comes back with its token
  if (!tip.hidden) placeTip();
}, { passive: true });
