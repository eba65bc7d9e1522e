"use strict";

const runs = data.rows.map((row, i) => ({ ...row, i, name: data.names[i] })).filter((row) => row.perplexity != null && row.active != null);
const comparable = new Set(data.comparable);
const same = runs.filter((row) => comparable.has(row.i));

if (runs.length) {
  const counts = d3.sort(new Set(runs.map((row) => row.experts)));
  const ink = (row) => colour(counts.indexOf(row.experts), Math.max(10, counts.length));
  const dense = [...new Map(same.filter((row) => row.dense_perplexity && row.dense_parameters).map((row) => [`${row.dense_parameters} ${row.dense_perplexity}`, { active: row.dense_parameters, perplexity: row.dense_perplexity }])).values()];
  const tell = (row) =>
    row.name
      ? `${row.name}\nrun ${row.run}\nperplexity ${show(row.perplexity)}\n${show(row.active)} active, ${show(row.total)} total parameters\nratio ${row.ratio}, ${row.experts} experts, top ${row.top_k}${comparable.has(row.i) ? "" : `\nmeasured on other texts (${row.texts})`}`
      : `dense model\nperplexity ${show(row.perplexity)}\n${show(row.active)} parameters`;
  figure("scatter", (width) => [
    legend([...counts.map((n) => [`${n} expert${n === 1 ? "" : "s"}`, colour(counts.indexOf(n), Math.max(10, counts.length))]), ["◇ dense model", "transparent"]]),
    Plot.plot({
      width, height: Math.min(440, Math.max(300, width * 0.5)), marginLeft: 58, marginTop: 28, marginRight: 24, marginBottom: 44,
      style: { fontSize: "11px", background: "transparent" },
      ariaLabel: "perplexity against active parameters",
      x: { label: "active parameters", tickFormat: amount, ticks: Math.max(3, Math.floor(width / 110)), grid: true, nice: true, inset: 8 },
      y: { label: "perplexity", grid: true, tickFormat: short, ticks: 6, nice: true, inset: 8 },
      marks: [
        Plot.line(data.front.map((i) => runs.find((row) => row.i === i)), { x: "active", y: "perplexity", stroke: "currentColor", strokeDasharray: "5,4", strokeOpacity: 0.7 }),
        Plot.dot(dense, { x: "active", y: "perplexity", symbol: "diamond", r: 6, stroke: "currentColor", strokeWidth: 1.6 }),
        Plot.dot(runs, { x: "active", y: "perplexity", r: 5.5, fill: { value: (row) => (comparable.has(row.i) ? ink(row) : "transparent"), scale: null }, stroke: { value: (row) => (row.i === data.best ? "currentColor" : ink(row)), scale: null }, strokeWidth: (row) => (row.i === data.best ? 2.4 : 1.2) }),
        Plot.tip([...runs, ...dense], Plot.pointer({ x: "active", y: "perplexity", title: tell, fontSize: 12 })),
      ],
    }),
  ]);
}

if (new Set(same.map((row) => row.experts)).size > 1) {
  const series = d3.sort(d3.groups(same, (row) => `${d3.format("~%")(row.ratio).replace("%", "\u00a0%")} pruned, top ${row.top_k}`), ([name]) => name);
  const best = series.map(([name, rows], s) => ({ name, ink: colour(s, Math.max(10, series.length)), points: d3.sort(d3.rollups(rows, (alike) => d3.least(alike, (row) => row.perplexity), (row) => row.experts).map(([, row]) => row), (row) => row.experts) }));
  const counts = d3.sort(new Set(same.map((row) => row.experts)));
  const dense = [...new Set(same.map((row) => row.dense_perplexity).filter((v) => v))];
  figure("experts", (width) => [
    legend([...best.map(({ name, ink }) => [name, ink]), ...(dense.length ? [["╌ dense model", "transparent"]] : [])]),
    Plot.plot({
      width: Math.min(width, 760), height: 320, marginLeft: 58, marginTop: 28, marginRight: 24, marginBottom: 44,
      style: { fontSize: "11px", background: "transparent" },
      ariaLabel: "perplexity against the number of experts",
      x: { type: "point", domain: counts, label: "experts", padding: 0.3 },
      y: { label: "perplexity", grid: true, tickFormat: short, ticks: 6, nice: true, inset: 8 },
      marks: [
        Plot.ruleY(dense, { strokeDasharray: "5,4", strokeOpacity: 0.7 }),
        ...best.map(({ points, ink }) => Plot.line(points, { x: "experts", y: "perplexity", stroke: ink, strokeWidth: 1.8 })),
        ...best.map(({ points, ink }) => Plot.dot(points, { x: "experts", y: "perplexity", r: 4.5, fill: ink, stroke: "var(--back)" })),
        Plot.tip(best.flatMap(({ points }) => points), Plot.pointer({ x: "experts", y: "perplexity", fontSize: 12, title: (row) => `${row.name}\nperplexity ${show(row.perplexity)}\n${show(row.active)} active, ${show(row.total)} total parameters\nrun ${row.run}` })),
      ],
    }),
  ]);
}

if (same.length) {
  const ratios = d3.sort(new Set(same.map((row) => row.ratio)));
  const experts = d3.sort(new Set(same.map((row) => row.experts)));
  const best = d3.rollup(same, (rows) => d3.least(rows, (row) => row.perplexity), (row) => row.ratio, (row) => row.experts);
  const at = (i, j) => best.get(ratios[i])?.get(experts[j]);
  const [low, high] = d3.extent([...best.values()].flatMap((row) => [...row.values()]), (row) => row.perplexity);
  figure("grid", (width) => [
    heatScale("perplexity", show(low), show(high)),
    matrix({
      label: "lowest perplexity by pruning ratio and number of experts",
      rows: ratios.map((r) => `${d3.format("~%")(r).replace("%", "\u00a0%")} pruned`), columns: experts.map(String), width: Math.min(width, 640), cell: 52, rowHeight: 32, fontSize: 11, xLabel: "experts",
      value: (i, j) => at(i, j)?.perplexity, shade: (v) => (high > low ? (v - low) / (high - low) : 0.3), text: (v) => short(v),
      ring: (i, j) => at(i, j)?.i === data.best,
      title: (i, j, v) => (v == null ? "no run" : `${at(i, j).name}\nperplexity ${show(v)}\nrun ${at(i, j).run}`),
    }),
  ]);
}
