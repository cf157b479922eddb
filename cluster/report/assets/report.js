"use strict";
// Draws curves and tokens. Every text of a run enters the page as textContent, never as HTML.
(async () => {
  const CURVES = [
    ["KL to the teacher per token", "nats", { "train/kl": "training", "held_out/kl": "held out" }],
    ["Accuracy (mean reward)", "", { "rollout/reward": "training", "held_out/accuracy": "held out" }],
    ["Completion length", "tokens", { "rollout/completion_length": "training", "held_out/completion_length": "held out" }],
    ["Entropy of the student", "nats per token", { "train/entropy": "entropy" }],
    ["Throughput", "tokens per second", { "step/tokens_per_second": "whole step", "generate/tokens_per_second": "generate", "score/tokens_per_second": "score", "learn/tokens_per_second": "learn" }],
    ["Idle share of each pool", "share of time", { "pool/*/idle_share": "*" }],
    ["Loss", "per token", { "train/loss": "loss" }],
    ["Gradient norm", "before clipping", { "train/gradient_norm": "norm" }],
    ["Probability on the candidates", "", { "train/student_candidate_mass": "student", "train/teacher_candidate_mass": "teacher" }],
    ["Cut and repeating completions", "share", { "rollout/truncated_ratio": "cut at the limit", "rollout/repetition_ratio": "repeating" }],
    ["Turns of an episode", "", { "rollout/turns": "mean" }],
    ["Episodes whose environment failed", "", { "rollout/environment_errors": "of the step" }],
    ["Sampler and learner apart", "nats per token", { "train/sampler_learner_gap": "mean" }],
    ["Staleness", "updates", { "staleness/mean": "mean", "staleness/max": "largest" }],
  ];
  const STAGES = { "generate/seconds": "generate", "score/seconds": "score", "learn/wait_seconds": "learn", "sync/seconds": "sync" };
  const MARKS = { alarm: "#d55e00", restart: "#cc79a7", start: "#56b4e9", move: "#009e73", teacher: "#e69f00" };
  const LINES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"];
  // Okabe and Ito's colours, which people with any colour vision tell apart; black is the text's colour.
  const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c8c00", "#7f7f7f"];
  const MOST_MARKS = 200;
  const AT_ONCE = 2; // charts, before the page is ready; the others follow one by one
  const $ = (id) => document.getElementById(id);
  const make = (name, text, kind) => Object.assign(document.createElement(name), { textContent: text ?? "", className: kind ?? "" });

  async function unpack(id) {
    const bytes = Uint8Array.from(atob($(id).textContent), (one) => one.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  }

  const [library, json] = await Promise.all([unpack("plotly"), unpack("data")]);
  document.head.append(make("script", library));
  const runs = JSON.parse(json);
  const several = runs.length > 1;

  // ---- charts
  const charts = [];
  function layout(title, unit, more) {
    const style = getComputedStyle(document.documentElement);
    const of = (name) => style.getPropertyValue(name).trim();
    const axis = { gridcolor: of("--line"), zerolinecolor: of("--line"), linecolor: of("--line"), automargin: true };
    return {
      title: { text: title, font: { size: 14 }, x: 0, xanchor: "left" }, font: { color: of("--ink"), size: 12 },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 50, r: 10, t: 34, b: 84 }, height: 310,
      legend: { orientation: "h", yref: "container", y: 0, yanchor: "bottom" }, hovermode: "x unified", hoverlabel: { bgcolor: of("--paper"), font: { color: of("--ink") } },
      colorway: COLOURS, xaxis: { ...axis, ...more.xaxis }, yaxis: { ...axis, title: { text: unit }, rangemode: "tozero" },
      shapes: more.shapes ?? [], barmode: more.barmode, bargap: more.bargap ?? 0.05,
    };
  }
  function draw(parent, title, unit, traces, more) {
    const element = make("div", "", "chart");
    element.setAttribute("role", "img");
    element.setAttribute("aria-label", `${title}: ${traces.map((trace) => trace.name).join(", ")}`);
    $(parent).append(element);
    charts.push({ element, title, unit, traces, more });
  }
  function drawOne({ element, title, unit, traces, more }) {
    const axis = Number($("axis").value);
    const drawn = traces.map(({ points, ...trace }) => (points ? { ...trace, x: points[axis], y: points[2] } : trace));
    const named = more.marks ? { xaxis: { title: { text: axis ? "hours" : "step" } }, shapes: marks(axis) } : {};
    Plotly.react(element, drawn, layout(title, unit, { ...more, ...named }), { responsive: true, displaylogo: false, displayModeBar: false });
  }
  const redraw = () => charts.forEach(drawOne);
  function marks(axis) {
    const shapes = [];
    for (const run of runs) {
      const [steps, hours] = run.curves["step/seconds"] ?? [[], []];
      for (const event of run.events) {
        const place = steps.findIndex((step) => step >= event.step);
        const x = axis ? (place < 0 ? hours.at(-1) ?? 0 : hours[place]) : event.step;
        shapes.push({ type: "line", x0: x, x1: x, yref: "paper", y0: 0, y1: 1, line: { color: MARKS[event.kind] ?? "#7f7f7f", width: 1, dash: "dot" } });
      }
    }
    return shapes.slice(0, MOST_MARKS);
  }
  function named(run, patterns) {
    return Object.entries(patterns).flatMap(([pattern, label]) => {
      const [before, after] = pattern.split("*");
      if (after === undefined) return run.curves[pattern] ? [[label, run.curves[pattern]]] : [];
      const names = Object.keys(run.curves).filter((name) => name.startsWith(before) && name.endsWith(after));
      return names.map((name) => [name.slice(before.length, -after.length), run.curves[name]]);
    });
  }
  function line(number, run, label, place, points) {
    const [steps] = points;
    return {
      name: several ? `${run.name}: ${label}` : label, points, type: "scatter", mode: steps.length < 30 ? "lines+markers" : "lines",
      line: { color: COLOURS[(several ? number : place) % COLOURS.length], dash: LINES[(several ? place : 0) % LINES.length], width: 2 },
    };
  }
  for (const [title, unit, patterns] of CURVES) {
    const shown = several && title === "Throughput" ? { "step/tokens_per_second": "whole step" } : patterns;
    const traces = runs.flatMap((run, number) => named(run, shown).map(([label, points], place) => line(number, run, label, place, points)));
    if (traces.length) draw("curve-charts", title, unit, traces, { marks: true });
  }
  runs.forEach((run, number) => {
    const of = several ? `${run.name}: ` : "";
    const stages = named(run, STAGES).map(([name, points], place) => ({ name, points, type: "bar", marker: { color: COLOURS[place] } }));
    if (stages.length) draw("time-charts", `${of}seconds of each step`, "seconds", stages, { marks: true, barmode: "stack", bargap: 0 });
    const busy = named(run, { "pool/*/busy_share": "*" }).map(([name, points], place) => line(0, { name: "" }, name, place, points));
    busy.forEach((trace, place) => { trace.name = trace.name.replace(/^: /, ""); trace.line = { color: COLOURS[place % COLOURS.length], width: 2 }; });
    if (busy.length) draw("time-charts", `${of}share of the time in which each pool worked`, "", busy, { marks: true });
    for (const { title, unit, edges, shares } of run.distributions) {
      const middles = edges.slice(1).map((edge, place) => (edge + edges[place]) / 2);
      const bars = Object.entries(shares).map(([name, share], place) => ({ name, x: middles, y: share, type: "bar", opacity: 0.75, marker: { color: COLOURS[place] } }));
      draw("distribution-charts", of + title, "share", bars, { barmode: "overlay", xaxis: { title: { text: unit } } });
    }
  });
  for (const id of ["curve-charts", "time-charts", "distribution-charts"]) {
    if (!$(id).children.length) $(id).append(make("p", "Nothing is recorded that could be shown here."));
  }
  $("axis").addEventListener("change", redraw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  matchMedia("print").addEventListener("change", redraw);

  // ---- tokens
  const WORDS = {
    log_ratio: "log-ratio student / teacher", student_entropy: "student's entropy", teacher_entropy: "teacher's entropy",
    loss: "loss", loss_weight: "weight of its place in the loss", candidate_mass: "student's probability of the candidates",
    policy_version: "policy version", student_logprobs: "student's log-probability", teacher_logprobs: "teacher's log-probability",
    rollout_logprobs: "sampler's log-probability",
  };
  const FIRST = Object.keys(WORDS);
  const label = (name) => WORDS[name] ?? name.replaceAll("_", " ");
  const signs = { "\n": "\u23ce\n", "\r": "\u240d", "\t": "\u21e5\t" };
  const visible = (text) => text.replace(/[\u0000-\u001f\u007f]/g, (one) => signs[one] ?? (one === "\u007f" ? "\u2421" : String.fromCharCode(0x2400 + one.charCodeAt(0))));
  const number = (value) => (typeof value !== "number" ? String(value ?? "") : Number.isInteger(value) ? String(value) : value.toPrecision(4));
  const percent = (logprob) => (logprob === null || logprob === undefined ? "" : (100 * Math.exp(logprob)).toPrecision(4) + " %");
  let row, spans = [], now = -1;

  const run = () => runs[Number($("token-run").value)];
  function option(select, value, text) { const one = make("option", text); one.value = value; select.append(one); }
  function listRows() {
    $("token-row").replaceChildren();
    run().tokens.rows.forEach((one, place) => option($("token-row"), place, `step ${one.facts.step}, trajectory ${one.facts.episode_id ?? one.facts.trajectory_id}${one.facts.turn ? ` from turn ${one.facts.turn + 1}` : ""}, ${number(one.facts.log_ratio)} nats per token${one.facts.reason === "worst" ? ", the step's worst" : ""}`));
  }
  function show(place) {
    row = run().tokens.rows[place];
    if (!row) { $("token-text").textContent = "No trajectory of this run was kept."; return; }
    $("token-row").value = place;
    const colours = [...FIRST.filter((name) => row.columns[name]), ...Object.keys(row.columns).filter((name) => !FIRST.includes(name))];
    const chosen = $("token-colour").value;
    $("token-colour").replaceChildren();
    for (const name of colours) option($("token-colour"), name, label(name));
    if (colours.includes(chosen)) $("token-colour").value = chosen;
    $("row-facts").textContent = Object.entries(row.facts).filter(([, value]) => value !== null && value !== "").map(([name, value]) => `${name.replaceAll("_", " ")} ${number(value)}`).join(" \u00b7 ");
    let completion = 0;
    spans = row.texts.map((text, place) => {
      const span = make("span", visible(text) || "\u00b7", `token ${row.kinds[place]}${text ? "" : " sign"}`);
      span.dataset.place = place;
      if (row.kinds[place] === "c") span.dataset.column = completion++;
      return span;
    });
    const more = row.left_out ? [make("span", ` \u2026 and ${row.left_out} more tokens`, "token p")] : [];
    $("token-text").replaceChildren(...spans, ...more);
    $("contexts").replaceChildren(...Object.entries(row.contexts).flatMap(([name, texts]) => [make("h3", `${label(name)}: what this model read in the student's place`), make("pre", texts.map(visible).join(""))]));
    now = -1; hide(); paint();
  }
  function paint() {
    const name = $("token-colour").value, values = row.columns[name] ?? [];
    const known = values.filter((value) => value !== null);
    const signed = known.some((value) => value < 0) && known.some((value) => value > 0);
    const sizes = known.map(Math.abs).sort((a, b) => a - b);
    const low = signed ? 0 : Math.min(...known), top = signed ? sizes[Math.floor(0.98 * (sizes.length - 1))] : Math.max(...known);
    const colour = (value) => {
      if (value === null || !known.length) return "";
      const size = Math.min(1, ((signed ? Math.abs(value) : value) - low) / (top - low || 1));
      return `rgba(var(${value < 0 && signed ? "--warm" : "--tint"}), ${(0.75 * size).toFixed(3)})`;
    };
    for (const span of spans) span.style.background = span.dataset.column === undefined ? "" : colour(values[span.dataset.column] ?? null);
    const steps = signed ? [-top, -top / 2, 0, top / 2, top] : [low, (low + top) / 2, top];
    $("scale").replaceChildren(...(known.length ? steps.flatMap((value) => { const box = make("i"); box.style.background = colour(value); return [box, make("span", number(value))]; }) : []));
  }
  function listed(column) {
    // Unites candidates and top tokens: token id -> model -> log-probability; `now` is the token that was sampled.
    const tokens = new Map(), models = new Set();
    for (const [name, ids] of Object.entries(row.lists)) {
      const source = name === "candidate_ids" ? /^(.*_)?candidate_(?:rollout_)?logprobs$/ : name.endsWith("_top_ids") ? new RegExp(`^${name.slice(0, -"_ids".length)}_logprobs$`) : null;
      if (!source) continue;
      for (const [other, values] of Object.entries(row.lists)) {
        if (!source.test(other)) continue;
        const model = other === "candidate_rollout_logprobs" ? "sampler" : other.split("_candidate_")[0].split("_top_")[0];
        models.add(model);
        ids[column].forEach((id, place) => { if (!tokens.has(id)) tokens.set(id, {}); tokens.get(id)[model] = values[column][place]; });
      }
    }
    const sampled = row.ids[now];
    const own = tokens.get(sampled) ?? {};
    for (const [name, values] of Object.entries(row.columns)) {
      const model = name === "rollout_logprobs" ? "sampler" : name.endsWith("_logprobs") ? name.slice(0, -"_logprobs".length) : null;
      if (model) { models.add(model); own[model] = values[column]; }
    }
    tokens.set(sampled, own);
    const order = [...tokens].sort(([, a], [, b]) => Math.max(...Object.values(b).map((one) => one ?? -99)) - Math.max(...Object.values(a).map((one) => one ?? -99)));
    return { sampled, models: ["student", "teacher", ...[...models].filter((one) => one !== "student" && one !== "teacher")].filter((one) => models.has(one)), order };
  }
  function hover(span) {
    spans[now]?.classList.remove("now");
    now = Number(span.dataset.place);
    span.classList.add("now");
    const box = $("hover");
    box.replaceChildren(make("div", `token ${now}: ${JSON.stringify(row.texts[now])}, id ${row.ids[now]}`));
    const column = span.dataset.column;
    if (column === undefined) {
      box.append(make("div", row.kinds[now] === "p" ? "prompt: read, not learned from" : "context or tool: read, not learned from"));
    } else {
      box.append(make("div", Object.entries(row.columns).map(([name, values]) => `${label(name)} ${number(values[column])}`).join(" \u00b7 ")));
      const { sampled, models, order } = listed(column), table = make("table"), head = make("tr");
      head.append(make("th", "token"), ...models.map((model) => make("th", model)));
      table.append(head);
      for (const [id, of] of order.slice(0, 12)) {
        const line = make("tr", "", id === sampled ? "sampled" : "");
        const text = id === sampled ? row.texts[now] : run().tokens.vocabulary[id] ?? `id ${id}`;
        line.append(make("td", visible(text || "\u00b7") + (id === sampled ? " \u25c0" : "")), ...models.map((model) => make("td", percent(of[model]))));
        line.dataset.id = id;
        table.append(line);
      }
      box.append(table);
    }
    box.style.display = "block";
    const place = span.getBoundingClientRect();
    box.style.left = `${Math.max(4, Math.min(place.left, innerWidth - box.offsetWidth - 8))}px`;
    box.style.top = `${place.bottom + box.offsetHeight + 8 < innerHeight ? place.bottom + 6 : Math.max(4, place.top - box.offsetHeight - 6)}px`;
  }
  function hide() { $("hover").style.display = "none"; spans[now]?.classList.remove("now"); }
  const token = (event) => event.target.closest?.("[data-place]");
  $("token-text").addEventListener("mouseover", (event) => { if (token(event)) hover(token(event)); });
  $("token-text").addEventListener("click", (event) => { if (token(event)) hover(token(event)); });
  $("token-text").addEventListener("mouseleave", hide);
  $("token-text").addEventListener("blur", hide);
  $("token-text").addEventListener("keydown", (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const next = move && spans[Math.max(0, Math.min(spans.length - 1, now + move))];
    if (!next) return;
    event.preventDefault();
    next.scrollIntoView({ block: "nearest" });
    hover(next);
  });
  $("token-run").addEventListener("change", () => { listRows(); show(0); });
  $("token-row").addEventListener("change", () => show(Number($("token-row").value)));
  $("token-colour").addEventListener("change", paint);
  const step = (by) => show(Math.max(0, Math.min(run().tokens.rows.length - 1, Number($("token-row").value) + by)));
  $("previous").addEventListener("click", () => step(-1));
  $("next").addEventListener("click", () => step(1));
  document.querySelectorAll("button.show").forEach((button) => button.addEventListener("click", () => {
    $("token-run").value = button.dataset.run; listRows(); show(Number(button.dataset.row)); $("tokens").scrollIntoView();
  }));
  runs.forEach((one, place) => option($("token-run"), place, one.name));
  listRows();
  show(0);
  charts.slice(0, AT_ONCE).forEach(drawOne);
  document.documentElement.dataset.ready = "yes";
  for (const chart of charts.slice(AT_ONCE)) {
    await new Promise((resolve) => setTimeout(resolve));  // the page answers meanwhile
    drawOne(chart);
  }
  document.documentElement.dataset.ready = "all";
})();
