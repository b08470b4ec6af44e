// What is packed into a page: its data and plotly.js.

const byId = (id) => document.getElementById(id);
const fromBase64 = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));

async function unpack(id) {
  const packed = new Blob([fromBase64(byId(id).textContent)]).stream();
  return new Response(packed.pipeThrough(new DecompressionStream("gzip"))).text();
}

async function loadPlotly() {
  const script = document.createElement("script");
  script.textContent = await unpack("plotly-gz");
  document.head.append(script);
}

// the picture on dark screens; on paper and on light ones it is as Python drew it
let onPaper = false;
const screen = matchMedia("screen and (prefers-color-scheme: dark)");
const isDark = () => screen.matches && !onPaper;
const DARK = { paper_bgcolor: "rgba(0, 0, 0, 0)", plot_bgcolor: "#22282d" };

const themed = (layout) =>
  (isDark() ? { ...layout, ...DARK, font: { ...layout.font, color: "#c9d0d6" } } : layout);

function tinted(trace) {
  if (!isDark()) return trace;
  if (trace.name === "wave") return { ...trace, line: { ...trace.line, color: "#9fb4c4" } };
  return trace.name === "mel" && trace.zmin !== -trace.zmax ? { ...trace, reversescale: true } : trace;
}

const PLOTLY = {
  responsive: true, displaylogo: false, showSendToCloud: false, plotlyServerURL: "",
  modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
};
