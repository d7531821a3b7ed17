// What pages do beyond links and forms: charts from the numbers in `data-chart`, local times, forms that answer to
// changes. Pages that bring more listen for "console:ready" on what was put into the page.
"use strict";

(() => {
  const styles = () => getComputedStyle(document.documentElement);
  const colour = (name) => styles().getPropertyValue(name).trim();

  function paths(kind) {
    if (kind === "bars") return uPlot.paths.bars({ size: [0.7, 64] });
    if (kind === "points") return () => null;
    return uPlot.paths.linear();
  }

  // Bands across the chart (y from, to) and marks on its x axis, below the lines.
  function behind(data) {
    return (plot) => {
      const { ctx, bbox } = plot;
      ctx.save();
      for (const band of data.bands || []) {
        const top = plot.valToPos(Math.min(band.to, plot.scales.y.max), "y", true);
        const bottom = plot.valToPos(Math.max(band.from, plot.scales.y.min), "y", true);
        ctx.fillStyle = colour("--band");
        ctx.fillRect(bbox.left, top, bbox.width, bottom - top);
      }
      for (const mark of data.marks || []) {
        const x = plot.valToPos(mark.x, "x", true);
        ctx.strokeStyle = colour("--strong-line");
        ctx.setLineDash([4, 4]);
        ctx.beginPath();
        ctx.moveTo(x, bbox.top);
        ctx.lineTo(x, bbox.top + bbox.height);
        ctx.stroke();
        ctx.setLineDash([]);
        ctx.fillStyle = colour("--quiet");
        ctx.font = `${12 * devicePixelRatio}px system-ui, sans-serif`;
        ctx.fillText(mark.label, x + 4 * devicePixelRatio, bbox.top + 12 * devicePixelRatio);
      }
      ctx.restore();
    };
  }

  function axis(label, more) {
    return {
      label,
      stroke: colour("--quiet"),
      grid: { stroke: colour("--line"), width: 1 },
      ticks: { stroke: colour("--line"), width: 1 },
      labelFont: "12px system-ui, sans-serif",
      font: "12px system-ui, sans-serif",
      ...more,
    };
  }

  function range(wanted) {
    if (wanted.min === undefined && wanted.max === undefined) return undefined;
    return (_, low, high) => [wanted.min ?? low, wanted.max ?? (high === wanted.min ? high + 1 : high)];
  }

  function draw(host) {
    const data = JSON.parse(host.dataset.chart);
    host.replaceChildren();
    const names = data.x.names;
    const values = data.x.values;
    const gap = values.length > 1 ? (values[values.length - 1] - values[0]) / (values.length - 1) : 1;
    const hasBars = data.series.some((each) => each.kind === "bars");
    const margin = hasBars ? gap * 0.6 : gap * 0.08;
    const right = data.series.some((each) => each.axis === "right");
    const options = {
      width: Math.max(240, host.clientWidth),
      height: data.height || 260,
      scales: {
        x: { time: false, range: () => [values[0] - margin, values[values.length - 1] + margin] },
        y: { range: range(data.y) },
        ...(right ? { right: { range: range(data.right || {}) } } : {}),
      },
      axes: [
        axis(data.x.label, {
          ...(data.x.exact || names ? { splits: () => values, grid: { show: false } } : {}),
          ...(names ? { values: (_, splits) => splits.map((at) => names[values.indexOf(at)] ?? "") } : {}),
        }),
        axis(data.y.label, { size: 62 }),
        ...(right ? [axis((data.right || {}).label, { scale: "right", side: 1, size: 62, grid: { show: false } })] : []),
      ],
      series: [
        names ? { label: data.x.label, value: (_, at) => names[values.indexOf(at)] ?? "" } : { label: data.x.label },
        ...data.series.map((each, index) => ({
          label: each.label,
          scale: each.axis === "right" ? "right" : "y",
          stroke: colour(`--s${index % 8}`),
          fill: each.kind === "bars" ? colour(`--s${index % 8}`) : undefined,
          width: each.kind === "bars" ? 0 : 2,
          dash: each.dashed ? [6, 4] : undefined,
          paths: paths(each.kind),
          points: { show: each.kind !== "bars", size: 6, fill: colour(`--s${index % 8}`) },
          spanGaps: true,
        })),
      ],
      hooks: { drawClear: [behind(data)] },
      cursor: { drag: { x: false, y: false } },
    };
    const plot = new uPlot(options, [values, ...data.series.map((each) => each.values)], host);
    host.plot = plot;
    // A click on a bar or a point is told to the page: filters follow.
    plot.over.addEventListener("click", () => {
      const index = plot.cursor.idx;
      if (index === null || index === undefined) return;
      host.dispatchEvent(new CustomEvent("console:pick", { bubbles: true, detail: { index, value: values[index] } }));
      const addresses = data.links;
      if (addresses && addresses[index]) location.assign(addresses[index]);
    });
    if (data.links) plot.over.classList.add("links");
  }

  // What scrolls sideways has to be reached by keyboard.
  function reachable(root) {
    for (const wide of root.querySelectorAll(".wide")) {
      if (wide.scrollWidth > wide.clientWidth) wide.tabIndex = 0;
      else wide.removeAttribute("tabindex");
    }
  }

  function ready(root) {
    reachable(document);
    for (const host of root.querySelectorAll(".plot[data-chart]")) draw(host);
    for (const time of root.querySelectorAll("time[datetime]")) {
      time.title = new Date(time.dateTime).toLocaleString();
    }
    root.dispatchEvent(new CustomEvent("console:ready", { bubbles: true }));
  }

  let width = 0;
  function redraw() {
    for (const host of document.querySelectorAll(".plot[data-chart]")) {
      if (host.plot) host.plot.destroy();
      draw(host);
    }
  }

  document.addEventListener("DOMContentLoaded", () => {
    width = innerWidth;
    ready(document.body);
  });
  addEventListener("resize", () => {
    if (innerWidth !== width) {
      width = innerWidth;
      reachable(document);
      redraw();
    }
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

  document.addEventListener("htmx:load", (event) => {
    if (event.target !== document.body) ready(event.target);
  });
  // A session that has ended answers with the page to log in: that is for the whole window.
  document.addEventListener("htmx:beforeSwap", (event) => {
    const address = event.detail.xhr.responseURL || "";
    if (address && new URL(address).pathname.endsWith("/console/login")) {
      event.detail.shouldSwap = false;
      location.reload();
    }
  });
  // <select data-submit> and the like send their form when they change; the button remains for those without a script.
  document.addEventListener("change", (event) => {
    const control = event.target.closest("[data-submit]");
    if (control && control.form) control.form.requestSubmit();
  });
})();
