// The picture of a page: rows of clips above panels on one axis of seconds, with a frame around a
// stretch, a cursor where it plays, and the buttons of `base.html`.

const AROUND_S = 0.4; // what Shift plays before and behind a stretch

const say = (text) => { byId("status").textContent = text; };
const marked = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
const inSeconds = (start, end) => `${start.toFixed(2)}–${end.toFixed(2)} s`;

// the [start, end] in seconds and the [low, high] in Hz that a plotly point stands for, or null:
// of a heat map its column and its row, else the point itself
const spanOf = ({ data, pointIndex }) => data.meta?.spans?.[[pointIndex].flat().at(-1)] ?? null;
const bandOf = ({ data, pointIndex }) => data.meta?.bands?.[[pointIndex].flat()[0]] ?? null;

class Stage {
  #plot = byId("plot");
  #stage = byId("stage");
  #heard = null; // seconds
  #below = { traces: [], layout: {} };

  constructor(data) {
    this.clips = data.clips;
    this.sound = new Sound(data.clips, data.rate);
    this.sound.onmove = (seconds) => this.#moveCursor(seconds);
    this.sound.onstop = (seconds) => { this.#moveCursor(seconds); this.#showPlaying(); };
    this.#wireButtons();
  }

  // draw panels under the current clip; `layout` comes from Python's Rows.layout
  async draw(traces, layout) {
    this.#below = { traces, layout };
    await this.redraw();
    if (this.#plot.dataset.wired) return;
    this.#plot.dataset.wired = true;
    this.#wirePlot();
  }

  async redraw() {
    const { traces, layout } = this.#below;
    const clip = this.clips[this.sound.current];
    const shapes = [...(layout.shapes ?? []), ...clip.bounds.map((at) => bound(at, layout.meta.bottom))];
    const range = this.#plot.layout?.xaxis?.range; // stay zoomed
    const xaxis = { ...layout.xaxis, ...(range && { range }) };
    const drawn = [...clip.traces, ...traces].map(tinted);
    await Plotly.react(this.#plot, drawn, themed({ ...layout, xaxis, shapes }), PLOTLY);
    this.hideFrame();
    this.hideOutline();
    this.#moveCursor(this.#heard);
  }

  on(event, listener) { this.#plot.on(event, listener); }

  // play a stretch of the current clip and say so
  async play(start, end, band = null) {
    await this.sound.play(start, end, band);
    this.frame(start, end);
    this.#stage.dataset.played = `${start} ${end}`;
    const hertz = band ? `, ${band[0].toFixed(0)}–${band[1].toFixed(0)} Hz` : "";
    say(`${this.clips[this.sound.current].name}, ${inSeconds(start, end)}${hertz}`);
    this.#showPlaying();
  }

  // play what a plotly point stands for: a stretch, a band of the spectrum, or both; with `widely`
  // a little of what is before and behind it, too
  async playPoint(point, widely = false) {
    const [span, band] = [spanOf(point), bandOf(point)];
    if (span || band) await this.play(...this.#around(span ?? [0, this.#seconds], widely), band);
  }

  #around([start, end], widely) {
    return widely ? [Math.max(0, start - AROUND_S), Math.min(this.#seconds, end + AROUND_S)] : [start, end];
  }

  // play the clip from the cursor (or a given second) on, or stop it
  async playOn(from = null) {
    if (this.sound.isPlaying && from === null) return this.sound.stop();
    const at = from ?? this.#heard ?? 0;
    await this.sound.play(at >= this.#seconds - 0.05 ? 0 : at);
    this.#showPlaying();
  }

  frame(start, end) { this.#place(byId("frame"), start, end); }
  hideFrame() { byId("frame").style.display = "none"; }

  // draw a line around a cell of a heat map, or around a bar and all above it
  outline({ x, y, xaxis, yaxis, width, type }, row, column) {
    const axes = this.#plot._fullLayout;
    const [across, up] = [xaxis, yaxis].map((name) => axes[name.replace(/^./, "$&axis")]);
    const middle = width ? x[column] : column;
    const half = (width?.[column] ?? 1) / 2;
    const isBar = type === "bar";
    const ends = (edges, at) => (typeof edges[0] === "number" ? [edges[at], edges[at + 1]]
      : [at - 0.5, at + 0.5]);
    const [left, right] = (isBar ? [middle - half, middle + half] : ends(x, column)).map(across.l2p);
    const [bottom, top] = isBar ? [up._length, 0] : ends(y, row).map(up.l2p);
    Object.assign(byId("chosen").style, {
      display: "block",
      left: `${across._offset + left}px`,
      top: `${up._offset + top}px`,
      width: `${right - left}px`,
      height: `${bottom - top}px`,
    });
  }

  hideOutline() { byId("chosen").style.display = "none"; }

  get #seconds() { return this.#below.layout.xaxis.range[1]; }

  #moveCursor(seconds) {
    this.#heard = seconds;
    if (seconds !== null) this.#place(byId("cursor"), seconds, seconds);
  }

  // stretch a box over start to end and over all rows that share the seconds
  #place(box, start, end) {
    const { xaxis, _size, meta } = this.#plot._fullLayout;
    const clip = (x) => Math.min(Math.max(xaxis.l2p(x), 0), xaxis._length);
    const [left, right] = [clip(start), clip(end)];
    Object.assign(box.style, {
      display: "block",
      left: `${xaxis._offset + left}px`,
      top: `${_size.t}px`,
      width: `${right - left}px`,
      height: `${_size.h * (1 - meta.bottom)}px`,
    });
  }

  #showPlaying() {
    byId("play").textContent = this.sound.isPlaying ? "■ Stop" : "▶ Play";
  }

  #wireButtons() {
    byId("play").addEventListener("click", () => this.playOn());
    document.querySelectorAll("input[name=clip]").forEach((input) => {
      input.addEventListener("change", () => {
        this.sound.stop();
        this.sound.current = Number(input.value);
        say(input.parentElement.title);
        this.redraw();
      });
    });
    document.querySelectorAll("button[data-start]").forEach((button) => {
      const { start, end, low, high } = button.dataset;
      const band = low === undefined ? null : [+low, +high];
      button.addEventListener("click", ({ shiftKey }) =>
        this.play(...this.#around([+start, +end], shiftKey), band));
    });
    this.#stage.addEventListener("keydown", (event) => {
      if (event.key === " ") this.playOn();
      else if (event.key === "Escape") this.sound.stop();
      else return;
      event.preventDefault();
    });
    // paper is narrower than the screen
    const onto = (paper, width) => async () => {
      onPaper = paper;
      await this.redraw();
      await Plotly.relayout(this.#plot, { width });
    };
    window.addEventListener("beforeprint", onto(true, 1000));
    window.addEventListener("afterprint", onto(false, null));
    screen.addEventListener("change", () => this.redraw());
  }

  #wirePlot() {
    this.on("plotly_hover", ({ points: [point] }) => {
      const span = spanOf(point);
      if (span) this.frame(...span);
    });
    this.on("plotly_unhover", () => this.hideFrame());
    this.on("plotly_relayout", () => {
      this.hideFrame();
      this.hideOutline();
      this.#moveCursor(this.#heard);
    });
    this.on("plotly_click", ({ points: [point], event }) => {
      if (point.data.meta?.seek) this.playOn(point.x);
      else this.playPoint(point, event?.shiftKey);
    });
  }
}

function bound(at, bottom) {
  const line = { color: "rgba(60, 50, 30, 0.45)", width: 1, dash: "dot" };
  return { type: "line", x0: at, x1: at, y0: bottom, y1: 1, yref: "paper", line };
}

// start a page: `main(data, stage)`; whatever fails is said on the page
async function start(main) {
  try {
    const [data] = await Promise.all([unpack("data-gz").then(JSON.parse), loadPlotly()]);
    await main(data, new Stage(data));
    byId("stage").dataset.ready = "true";
  } catch (error) {
    say(`The picture cannot be drawn here: ${error}`);
    throw error;
  }
}
