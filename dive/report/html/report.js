"use strict";

const grouping = (groups) => {
  const of = new Map(groups.flatMap((members, number) => members.map((domain) => [domain, number])));
  const known = (domain) => groups.length > 1 && of.has(domain);
  return {
    of,
    ink: (domain) => (known(domain) ? colour(of.get(domain), groups.length) : "currentColor"),
    name: (domain) => (known(domain) ? `${domain} · ${of.get(domain)}` : domain),
  };
};
const named = (expert) => (data.names[expert] ? `expert ${expert}: ${data.names[expert]}` : `expert ${expert}`);
const mined = grouping(data.affinity?.groups ?? []);
const { of: groupOf, ink: groupInk, name: groupName } = data.groups.length > 1 ? grouping(data.groups) : mined;

/* ---- routing: domain × expert, layer by layer */

if (data.routing) {
  const domains = d3.sort(Object.keys(data.routing), (d) => groupOf.get(d) ?? 1e9);
  const layers = data.routing[domains[0]].length;
  const numbers = data.layers ?? d3.range(layers); // of those with experts
  const experts = data.routing[domains[0]][0].length;
  const built = data.groups.length === experts;
  let layer = -1;
  const share = (domain, expert) => (layer < 0 ? d3.mean(data.routing[domain], (row) => row[expert]) : data.routing[domain][layer][expert]);
  const most = d3.max(domains, (d) => d3.max(data.routing[d], (row) => d3.max(row)));
  const drawn = figure("routing", (width) => [
    heatScale("share of the domain's tokens", "0 %", percent(most)),
    matrix({
      label: "routing share by domain and expert", rows: domains, columns: d3.range(experts).map(String), width, cell: 26, rowHeight: 21,
      value: (i, j) => share(domains[i], j), shade: (v) => v / most, text: (v) => d3.format(".0f")(v * 100),
      ring: built ? (i, j) => groupOf.get(domains[i]) === j : null,
      rowInk: (d) => groupInk(domains[d]), columnInk: (d) => (built ? colour(d, experts) : "currentColor"),
      xLabel: "expert (values in %)",
      title: (i, j, v) => `${domains[i]} → ${named(j)}\n${d3.format(".1%")(v)} of its tokens\n${layer < 0 ? "mean over layers" : `layer ${numbers[layer]}`}${built && groupOf.get(domains[i]) === j ? "\nbuilt from this domain" : ""}`,
    }),
  ]);
  if (drawn && layers > 1) {
    const texts = ["mean of all", ...numbers.map((l) => `${l} of ${numbers[0]}–${numbers.at(-1)}`)];
    drawn.controls.append(slider("layer", texts, (value) => { layer = value - 1; drawn.redraw(); }));
  }
}

/* ---- a text, token by token */

if (data.texts.length) {
  const layers = data.texts[0].experts.length;
  const numbers = data.layers ?? d3.range(layers);
  const count = data.names.length;
  const fill = (expert) => colour(expert, Math.max(10, count));
  let [text, layer] = [0, -1];
  const expertOf = ({ experts }, token) => (layer < 0 ? d3.greatest(d3.rollups(experts, (lines) => lines.length, (line) => line[token]), ([, times]) => times)[0] : experts[layer][token]);
  const drawn = figure("texts", () => {
    const shown = data.texts[text];
    const spans = shown.tokens.map((token, i) => {
      const expert = expertOf(shown, i);
      const span = element("span", { textContent: token.replaceAll("\n", "↵\n"), title: named(expert) });
      span.style.background = `color-mix(in srgb, ${fill(expert)} 34%, transparent)`;
      return span;
    });
    return [legend(d3.range(count).map((expert) => [String(expert), fill(expert)])), element("div", { className: "coloured" }, ...spans)];
  });
  if (drawn) {
    drawn.controls.append(choice("text", data.texts.map(({ domain }, i) => [i, domain]), (value) => { text = Number(value); drawn.redraw(); }));
    if (layers > 1) drawn.controls.append(slider("layer", ["most of all", ...numbers.map((l) => `${l} of ${numbers[0]}–${numbers.at(-1)}`)], (value) => { layer = value - 1; drawn.redraw(); }));
  }
}

/* ---- perplexity by domain and stage */

const stageInks = data.stages.map((stage, i) => ["currentColor", colour(2), colour(1), colour(3), colour(0), colour(6), colour(5)][i] ?? colour(i));
if (data.domains.length) {
  const last = data.stages.length - 1;
  const points = data.domains.flatMap((row) => row.perplexity.map((v, s) => ({ domain: row.domain, v, s })).filter((p) => p.v != null));
  figure("domains", (width) => {
    const left = widest(data.domains.map((d) => d.domain)) + 14;
    const order = d3.sort(data.domains, (d) => d.perplexity[0]).map((d) => d.domain);
    return [
      legend(data.stages.map((s, i) => [s.label, stageInks[i]])),
      Plot.plot({
        width, height: 54 + 20 * order.length, marginLeft: left, marginTop: 8, marginBottom: 42, marginRight: 20,
        style: { fontSize: "11px", background: "transparent" },
        x: { type: "log", label: "perplexity (logarithmic)", grid: true, inset: 6, tickFormat: (v) => short(v), ticks: Math.max(2, Math.floor((width - left) / 130)) },
        y: { type: "point", domain: order, label: null, tickSize: 0, padding: 0.7 },
        ariaLabel: "perplexity by domain and stage",
        marks: [
          Plot.ruleY(data.domains, { y: "domain", x1: (d) => d3.min(d.perplexity), x2: (d) => d3.max(d.perplexity), strokeOpacity: 0.35 }),
          Plot.dot(points, { x: "v", y: "domain", r: { value: (d) => (d.s < 2 ? 4 : 3.4 + 1.8 * Math.min(3, last - d.s)), scale: null }, fill: { value: (d) => stageInks[d.s], scale: null }, stroke: "var(--back)", strokeWidth: 0.8 }),
          Plot.tip(points, Plot.pointer({ x: "v", y: "domain", title: (d) => `${d.domain}\n${data.stages[d.s].label}\nperplexity ${show(d.v)}`, fontSize: 12 })),
        ],
      }),
    ];
  });
}

/* ---- tasks, with a bar of one standard error to each side */

if (data.tasks.length) {
  const kept = d3.range(data.stages.length).filter((s) => data.tasks.some((row) => row.scores[s].value != null));
  const points = data.tasks.flatMap((row, i) => kept.map((s, k) => ({ ...row.scores[s], row, s, y: i + (k - (kept.length - 1) / 2) * (0.7 / kept.length) })).filter((p) => p.value != null));
  const reach = (sign) => (p) => p.value + sign * (p.error ?? 0);
  figure("tasks", (width) => {
    const left = widest(data.tasks.map((row) => row.task)) + 14;
    return [
      legend(kept.map((s) => [data.stages[s].label, stageInks[s]])),
      Plot.plot({
        width, height: 50 + data.tasks.length * (16 + 9 * kept.length), marginLeft: left, marginTop: 8, marginBottom: 42, marginRight: 20,
        style: { fontSize: "11px", background: "transparent" },
        x: { label: "score", grid: true, inset: 6, tickFormat: percent, ticks: Math.max(2, Math.floor((width - left) / 90)) },
        y: { domain: [-0.5, data.tasks.length - 0.5], reverse: true, axis: null },
        ariaLabel: "scores by task and stage, with standard errors",
        marks: [
          Plot.ruleY(d3.range(1, data.tasks.length).map((i) => i - 0.5), { strokeOpacity: 0.15 }),
          Plot.text(data.tasks, { y: (_, i) => i, frameAnchor: "left", textAnchor: "end", dx: -8, text: "task" }),
          Plot.ruleY(points.filter((p) => p.error != null), { y: "y", x1: reach(-1), x2: reach(1), stroke: { value: (p) => stageInks[p.s], scale: null }, strokeWidth: 1.6 }),
          Plot.dot(points, { x: "value", y: "y", r: 3.6, fill: { value: (p) => stageInks[p.s], scale: null }, stroke: "var(--back)", strokeWidth: 0.8 }),
          Plot.tip(points, Plot.pointer({ x: "value", y: "y", title: (p) => `${p.row.task}${p.row.metric ? `, ${p.row.metric}` : ""}\n${data.stages[p.s].label}\n${d3.format(".1%")(p.value)}${p.error == null ? "" : ` ± ${d3.format(".1%")(p.error)}`}`, fontSize: 12 })),
        ],
      }),
    ];
  });
}

/* ---- affinity with its tree, and the matrix it comes from */

if (data.affinity) {
  const { domains, affinity, perplexity, order, tree } = data.affinity;
  const names = order.map((i) => domains[i]);
  const low = d3.min(affinity.flat());
  const rowHeight = 20;
  figure("affinity", (width) => {
    const room = tree ? Math.min(180, Math.max(96, width * 0.17)) : 0;
    const heatmap = matrix({
      label: "affinity between domains", rows: names.map(mined.name), columns: names, width: width - room, cell: 20, rowHeight,
      value: (i, j) => affinity[order[i]][order[j]], shade: (v) => (v - low) / (1 - low || 1), text: (v) => d3.format(".2f")(v), fontSize: 9,
      rowInk: (d) => mined.ink(names[d]), columnInk: (d) => mined.ink(names[d]), xLabel: perplexity ? "measured on" : "domain", yLabel: perplexity ? "pruned on · group" : "domain · group",
      title: (i, j, v) => (perplexity ? `pruned on ${names[i]}, measured on ${names[j]}\naffinity ${show(v)}\nperplexity ${show(perplexity[order[i]][order[j]])}` : `${names[i]} and ${names[j]}\nsimilarity ${show(v)}`),
    });
    const nodes = [heatScale(perplexity ? "affinity" : "similarity", show(low), "1")];
    if (!tree) return [...nodes, heatmap];
    const height = Number(heatmap.getAttribute("height"));
    const marginTop = height - 8 - rowHeight * names.length;
    const far = d3.max(tree, (link) => d3.max(link.distance));
    const branches = tree.flatMap((link, number) => link.at.map((at, k) => ({ at, distance: link.distance[k], number, ink: link.group === "" ? "currentColor" : colour(Number(link.group), data.affinity.groups.length) })));
    const dendrogram = Plot.plot({
      width: room, height, marginTop, marginBottom: 8, marginLeft: 8, marginRight: 14, style: { fontSize: "10px", background: "transparent" },
      x: { domain: [far * 1.04, 0], label: null, axis: "top", ticks: 2, tickFormat: "~g" },
      y: { domain: [0, 10 * names.length], range: [marginTop, height - 8], axis: null },
      ariaLabel: "tree of the domains",
      marks: [
        Plot.text([perplexity ? "distance, 1 − r" : "distance"], { frameAnchor: "top", dy: -34, text: (d) => d, fontWeight: 600 }),
        Plot.line(branches, { x: "distance", y: "at", z: "number", stroke: { value: "ink", scale: null }, strokeWidth: 1.6 }),
        Plot.tip(tree, Plot.pointer({ x: (d) => d.distance[1], y: (d) => (d.at[1] + d.at[2]) / 2, title: (d) => `joined at ${show(d.distance[1])}`, fontSize: 12 })),
      ],
    });
    const side = element("div", {}, dendrogram, heatmap);
    side.style.display = "flex";
    return [...nodes, side];
  });

  if (perplexity) {
    const logs = perplexity.flat().map(Math.log);
    const [least, largest] = d3.extent(logs);
    figure("matrix", (width) => [
      heatScale("perplexity", show(Math.exp(least)), show(Math.exp(largest))),
      matrix({
        label: "perplexity pruned on one domain, measured on another", rows: names, columns: names, width, cell: 20, rowHeight,
        value: (i, j) => perplexity[order[i]][order[j]], shade: (v) => (Math.log(v) - least) / (largest - least || 1), text: (v) => d3.format(v >= 1000 ? ".2~s" : ".3~r")(v), fontSize: 9,
        rowInk: (d) => mined.ink(names[d]), columnInk: (d) => mined.ink(names[d]), xLabel: "measured on", yLabel: "pruned on",
        title: (i, j, v) => `pruned on ${names[i]}, measured on ${names[j]}\nperplexity ${show(v)}`,
      }),
    ]);
  }
}

/* ---- overlap */

if (data.overlap && data.overlap.length > 1) {
  const names = data.overlap.map((_, e) => String(e));
  const others = data.overlap.flatMap((row, i) => row.filter((_, j) => i !== j));
  const [low, high] = [d3.min(others), d3.max(others)];
  figure("overlap", (width) => [
    heatScale("Jaccard index", show(low), show(high)),
    matrix({
      label: "overlap between experts", rows: names, columns: names, width: Math.min(width, 620), cell: 29, rowHeight: 28, xLabel: "expert", yLabel: "expert",
      value: (i, j) => (i === j ? null : data.overlap[i][j]), shade: (v) => (high > low ? (v - low) / (high - low) : 0.5), text: (v) => d3.format(".2f")(v),
      rowInk: (d) => (data.groups.length === names.length ? colour(d, names.length) : "currentColor"), columnInk: (d) => (data.groups.length === names.length ? colour(d, names.length) : "currentColor"),
      title: (i, j, v) => (v == null ? `expert ${i} with itself: 1` : `${named(i)}\n${named(j)}\n${show(v)}${data.groups.length === names.length ? `\n${i}: ${data.groups[i].join(", ")}\n${j}: ${data.groups[j].join(", ")}` : ""}`),
    }),
  ]);
}

/* ---- curves */

const UNITS = { loss: "loss (nats per token)", learning_rate: "learning rate", tokens_per_second: "tokens per second", perplexity: "perplexity" };
const stageInk = (number) => colour(number, Math.max(10, data.curves.length));
const starts = data.curves.slice(1).map((_, i) => data.curves[i].tokens.at(-1));
const borders = Plot.ruleX(starts, { strokeDasharray: "3,4", strokeOpacity: 0.6 });

if (data.curves.length) {
  const metrics = [...new Set(data.curves.flatMap((c) => Object.keys(c.scalars)))];
  let metric = metrics.includes("loss") ? "loss" : metrics[0];
  const drawn = figure("curves", (width) => {
    const series = data.curves.filter((c) => c.scalars[metric]).map((c) => ({ name: `stage ${c.stage}`, colour: stageInk(data.curves.indexOf(c)), points: c.tokens.map((t, i) => [t, c.scalars[metric][i]]) }));
    return [legend(series.map((s) => [s.name, s.colour])), lines({ series, width, xLabel: "training tokens", yLabel: UNITS[metric] ?? metric, marks: [borders] })];
  });
  if (drawn && metrics.length > 1) {
    const first = [metric, ...metrics.filter((m) => m !== metric)];
    drawn.controls.append(choice("curve", first.map((m) => [m, UNITS[m] ?? m]), (value) => { metric = value; drawn.redraw(); }));
  }

  const kinds = [...new Set(data.curves.flatMap((c) => Object.keys(c.experts)))];
  const layersOf = (kind) => d3.sort(new Set(data.curves.flatMap((c) => Object.keys(c.experts[kind] ?? {}).map(Number))));
  if (kinds.length) {
    let kind = kinds.includes("expert_load") ? "expert_load" : kinds[0];
    let layer = null;
    const value = (curve, expert, i) => {
      const layers = curve.experts[kind];
      return layer == null ? d3.mean(Object.values(layers), (l) => l[expert]?.[i]) : layers[layer]?.[expert]?.[i];
    };
    const loads = figure("load", (width) => {
      const with_ = data.curves.filter((c) => c.experts[kind]);
      const experts = d3.sort(new Set(with_.flatMap((c) => Object.keys(Object.values(c.experts[kind])[0]).map(Number))));
      const series = with_.flatMap((c) => experts.map((e) => ({ name: named(e), of: `${c.stage}/${e}`, colour: colour(e, experts.length), points: c.tokens.map((t, i) => [t, value(c, e, i)]) })));
      return [
        legend(experts.map((e) => [named(e), colour(e, experts.length)])),
        lines({ series, width, xLabel: "training tokens", yLabel: kind === "expert_load" ? "share of the layer's tokens" : kind, format: kind === "expert_load" ? percent : short, zero: true, marks: [borders, Plot.ruleY([1 / experts.length], { strokeOpacity: 0.5 })] }),
      ];
    });
    if (loads) {
      if (kinds.length > 1) loads.controls.append(choice("figure", [kind, ...kinds.filter((k) => k !== kind)].map((k) => [k, k]), (v) => { kind = v; loads.redraw(); }));
      const layers = layersOf(kind);
      if (layers.length > 1) loads.controls.append(slider("layer", ["mean of all", ...layers.map((l) => `${l} of ${layers[0]}–${layers.at(-1)}`)], (v) => { layer = v ? layers[v - 1] : null; loads.redraw(); }));
    }
  }

  const perLayer = [...new Set(data.curves.flatMap((c) => Object.keys(c.layers)))];
  if (perLayer.length) {
    let kind = perLayer.includes("router_entropy") ? "router_entropy" : perLayer[0];
    const entropy = figure("entropy", (width) => {
      const with_ = data.curves.filter((c) => c.layers[kind]);
      const layers = d3.sort(new Set(with_.flatMap((c) => Object.keys(c.layers[kind]).map(Number))));
      const ink = (l) => lineShade(layers.length > 1 ? layers.indexOf(l) / (layers.length - 1) : 0.5);
      const series = with_.flatMap((c) => layers.filter((l) => c.layers[kind][l]).map((l) => ({ name: `layer ${l}`, of: `${c.stage}/${l}`, colour: ink(l), points: c.tokens.map((t, i) => [t, c.layers[kind][l][i]]) })));
      return [
        legend(layers.length > 12 ? [layers[0], layers[Math.floor(layers.length / 2)], layers.at(-1)].map((l) => [`layer ${l}`, ink(l)]) : layers.map((l) => [`layer ${l}`, ink(l)])),
        lines({ series, width, xLabel: "training tokens", yLabel: kind === "router_entropy" ? "entropy (nats)" : kind, zero: true, marks: [borders] }),
      ];
    });
    if (entropy && perLayer.length > 1) entropy.controls.append(choice("figure", [kind, ...perLayer.filter((k) => k !== kind)].map((k) => [k, k]), (v) => { kind = v; entropy.redraw(); }));
  }
}
