"use strict";
/* What the pages share: data, colours, figures that redraw at their width, sortable tables. Data reaches the page as text
   nodes and attributes alone, never as markup. */

const data = JSON.parse(document.getElementById("data").textContent);

/* Ten colours that page.css gives for light and for dark; more are spread over the circle, all equally light so that text can be read in them. */
const themed = (light, dark) => `light-dark(${light}, ${dark})`;
const wheel = (number, of, lightness) => d3.hcl((360 * (number % of)) / of, 55, lightness).formatHex();
const colour = (number, of = 10) => (of <= 10 ? `var(--c${number % 10})` : themed(wheel(number, of, 46), wheel(number, of, 76)));
/* A sequence, for lines: no shade of it comes near the page's background. */
const lineShade = (t) => themed(d3.interpolateViridis(0.8 * t), d3.interpolateViridis(0.3 + 0.7 * t));
const heat = d3.interpolateViridis;
const inkOn = (t) => (t < 0.45 ? "#ffffff" : "#10151d"); // readable on viridis

const show = (value) =>
  value == null ? "–" : Math.abs(value) >= 1e4 || (value !== 0 && Math.abs(value) < 1e-3) ? d3.format(".3~s")(value).replace("G", "B") : d3.format(",.4~r")(value);
const short = (value) => (value >= 1000 ? d3.format(".2~s")(value).replace("G", "B") : d3.format(",.3~r")(value));
const percent = (value) => d3.format(".0%")(value).replace("%", "\u00a0%");
const amount = (value) => d3.format("~s")(value).replace("G", "B");

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function widest(labels, size = 11) {
  const context = element("canvas").getContext("2d");
  context.font = `${size}px system-ui, sans-serif`;
  return Math.ceil(d3.max(labels, (label) => context.measureText(label).width) ?? 0);
}

/* Draws into the figure of that name, again whenever its width changes. `draw(width, controls)` returns nodes. */
function figure(name, draw) {
  const place = document.querySelector(`figure[data-figure="${name}"]`);
  if (!place) return null;
  const plot = place.querySelector(".plot");
  let width = 0;
  const redraw = () => {
    try {
      plot.replaceChildren(...[draw(width)].flat());
      place.dataset.drawn = "true";
    } catch (error) {
      place.dataset.drawn = "false";
      plot.replaceChildren(element("p", { className: "bad", textContent: `Could not be drawn: ${error.message}` }));
      console.error(`figure ${name}:`, error);
    }
  };
  const fit = () => {
    const now = Math.floor(place.clientWidth);
    if (!now || now === width) return;
    width = now;
    redraw();
  };
  fit();
  let waiting; // outside the observer's own round, which must not change sizes
  new ResizeObserver(() => {
    clearTimeout(waiting);
    waiting = setTimeout(fit, 60);
  }).observe(place);
  return { redraw, controls: place.querySelector(".controls") };
}

function choice(label, options, changed) {
  const select = element("select");
  for (const [value, text] of options) select.append(element("option", { value, textContent: text }));
  select.addEventListener("change", () => changed(select.value));
  return element("label", {}, label, select);
}

function slider(label, texts, changed) {
  const input = element("input", { type: "range", min: 0, max: texts.length - 1, value: 0 });
  const output = element("output", { textContent: texts[0] });
  input.setAttribute("aria-label", label);
  input.addEventListener("input", () => {
    output.textContent = texts[input.value];
    changed(Number(input.value));
  });
  return element("label", {}, label, input, output);
}

function legend(entries) {
  const made = element("div", { className: "legend" });
  for (const [text, fill] of entries) {
    const key = element("i");
    key.style.background = fill;
    made.append(element("span", {}, key, text));
  }
  return made;
}

function heatScale(title, low, high) {
  const bar = element("i");
  bar.style.background = `linear-gradient(to right, ${d3.range(0, 1.01, 0.1).map(heat).join(",")})`;
  return element("div", { className: "scale" }, element("span", { textContent: `${title}:` }), element("span", { textContent: low }), bar, element("span", { textContent: high }));
}

/* A matrix of coloured cells with its row and column names.
   label: for those who listen; rows, columns: names; value(i, j); shade(value) in [0, 1]; text(value) in the cell; ring(i, j) marks a cell. */
function matrix({ label, rows, columns, value, shade, text, title, ring, rowInk, columnInk, xLabel, yLabel, width, cell = 30, rowHeight = 20, left, fontSize = 10 }) {
  const slanted = widest(columns) > cell - 4;
  const top = (slanted ? widest(columns) * 0.94 + 12 : 20) + (xLabel ? 18 : 0);
  const marginLeft = left ?? widest(rows) + 14 + (yLabel ? 18 : 0);
  const right = 6;
  const inner = Math.max(cell * columns.length, Math.min(width - marginLeft - right, 44 * columns.length));
  const height = top + rowHeight * rows.length + 8;
  const cells = d3.cross(d3.range(rows.length), d3.range(columns.length), (i, j) => ({ i, j, v: value(i, j) }));
  const room = inner / columns.length;
  const ink = (names, inks) => (inks ? { fill: (d) => inks(d) } : { fill: "currentColor" });
  return Plot.plot({
    width: marginLeft + inner + right,
    height,
    marginTop: top,
    marginBottom: 8,
    marginLeft,
    marginRight: right,
    style: { fontSize: "11px", background: "transparent" },
    x: { type: "band", domain: d3.range(columns.length), padding: 0.03, axis: null },
    y: { type: "band", domain: d3.range(rows.length), padding: 0.03, axis: null },
    ariaLabel: label,
    marks: [
      Plot.cell(cells, { x: "j", y: "i", fill: { value: (d) => (d.v == null ? "#8884" : heat(shade(d.v))), scale: null } }),
      text && room >= 24 ? Plot.text(cells, { x: "j", y: "i", text: (d) => (d.v == null ? "" : text(d.v)), fill: { value: (d) => inkOn(shade(d.v)), scale: null }, fontSize, pointerEvents: "none" }) : null,
      ring ? Plot.cell(cells.filter((d) => ring(d.i, d.j)), { x: "j", y: "i", fill: "none", stroke: "#ff5a36", strokeWidth: 2.5, inset: 1.5, rx: 4 }) : null,
      Plot.text(d3.range(rows.length), { y: (d) => d, frameAnchor: "left", textAnchor: "end", dx: -6, text: (d) => rows[d], fill: { value: rowInk ? (d) => rowInk(d) : () => "currentColor", scale: null } }),
      Plot.text(d3.range(columns.length), { x: (d) => d, frameAnchor: "top", textAnchor: slanted ? "start" : "middle", rotate: slanted ? -90 : 0, dy: slanted ? -6 : -10, text: (d) => columns[d], fill: { value: columnInk ? (d) => columnInk(d) : () => "currentColor", scale: null } }),
      xLabel ? Plot.text([xLabel], { frameAnchor: "top-left", dy: -top + 8, dx: 0, text: (d) => d, fontWeight: 600, textAnchor: "start" }) : null,
      yLabel ? Plot.text([yLabel], { frameAnchor: "left", dx: -marginLeft + 8, rotate: -90, text: (d) => d, fontWeight: 600, textAnchor: "middle" }) : null,
      Plot.tip(cells, Plot.pointer({ x: "j", y: "i", maxRadius: 30, title: (d) => title(d.i, d.j, d.v), fontSize: 12 })),
    ],
  });
}

/* Lines over one x, with a tip. series: [{name, colour, points: [[x, y], ...]}]. */
function lines({ series, width, xLabel, yLabel, format = short, yLog = false, zero = false, marks = [], yDomain }) {
  const points = series.flatMap((s) => s.points.filter((p) => p[1] != null).map(([x, y]) => ({ x, y, name: s.name, of: s.of ?? s.name, colour: s.colour })));
  const few = series.every((s) => s.points.length <= 40);
  return Plot.plot({
    width,
    height: Math.min(340, Math.max(240, width * 0.45)),
    marginLeft: 56,
    marginTop: 26,
    marginRight: 16,
    marginBottom: 42,
    style: { fontSize: "11px", background: "transparent" },
    x: { label: xLabel, zero: true, tickFormat: amount, ticks: Math.max(3, Math.floor(width / 110)) },
    y: { label: yLabel, grid: true, zero, type: yLog ? "log" : "linear", tickFormat: (v) => format(v), ticks: 6, ...(yDomain ? { domain: yDomain } : {}) },
    marks: [
      ...marks,
      Plot.line(points, { x: "x", y: "y", z: "of", stroke: { value: "colour", scale: null }, strokeWidth: 1.8 }),
      few ? Plot.dot(points, { x: "x", y: "y", r: 2.6, fill: { value: "colour", scale: null } }) : null,
      Plot.tip(points, Plot.pointer({ x: "x", y: "y", title: (d) => `${d.name}\n${yLabel}: ${format === short ? show(d.y) : format(d.y)}\n${xLabel}: ${show(d.x)}`, fontSize: 12 })),
    ],
  });
}

for (const chip of document.querySelectorAll(".chip[data-expert]")) {
  chip.style.background = colour(Number(chip.dataset.expert), (data.groups ?? []).length || 10);
}

/* A click on a heading sorts by its column, by data-value where a cell has one. */
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  table.querySelectorAll("thead th").forEach((heading, column) => {
    const button = element("button", { type: "button", textContent: heading.textContent.replaceAll(".", ".\u200b") }); // names of settings may break at their dots
    heading.replaceChildren(button);
    heading.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const down = heading.getAttribute("aria-sort") === "ascending";
      table.querySelectorAll("th").forEach((other) => other.setAttribute("aria-sort", "none"));
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => {
        const cell = row.cells[column];
        const text = cell.dataset.value ?? cell.textContent.trim();
        const number = Number.parseFloat(text.replaceAll(",", ""));
        return Number.isNaN(number) ? text : number;
      };
      const order = (a, b) => (typeof a === typeof b ? d3.ascending(a, b) : typeof a === "number" ? -1 : 1);
      body.append(...[...body.rows].sort((a, b) => (down ? -1 : 1) * order(key(a), key(b))));
    });
  });
}
