// The picture of the explorer on one canvas: words, waveform, spectrogram, the layer by time map and
// a head's attention, one under the other on one axis of seconds.

const LEFT = 72, RIGHT = 12;

function fromBase64(text) { return Uint8Array.from(atob(text), (c) => c.charCodeAt(0)); }

// what Python sends of a sound, as a page draws and plays it
function soundOf({ rate, seconds, pcm, mel, words, name }) {
  const levels = new Int16Array(fromBase64(pcm).buffer);
  const db = new Int8Array(fromBase64(mel.db).buffer);
  const samples = Float32Array.from(levels, (level) => level / 32767);
  return { name, rate, seconds, samples, words, mel: { bands: mel.bands, db } };
}

class Picture {
  #canvas; #context; #spectrogram = null; #colours = {};

  constructor(canvas, state) {
    this.#canvas = canvas;
    this.#context = canvas.getContext("2d");
    this.state = state; // what is drawn; see explorer.js
    this.lanes = {};
    this.cursor = null;
    new ResizeObserver(() => this.draw()).observe(canvas.parentElement);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
      this.#spectrogram = null;
      this.draw();
    });
  }

  // ---------------------------------------------------------------- where things lie

  get width() { return this.#canvas.parentElement.clientWidth; }
  get #inner() { return Math.max(10, this.width - LEFT - RIGHT); }

  x(seconds) { return LEFT + (seconds / this.state.sound.seconds) * this.#inner; }

  seconds(x) {
    const at = ((x - LEFT) / this.#inner) * this.state.sound.seconds;
    return Math.max(0, Math.min(this.state.sound.seconds, at));
  }

  // the lane under a point, and the row of the map
  at(x, y) {
    const found = Object.entries(this.lanes).find(([, lane]) => y >= lane.top && y < lane.top + lane.height);
    if (!found) return { lane: null };
    const [lane, { top, height }] = found;
    if (lane !== "map") return { lane };
    const count = this.state.layers.length;
    return { lane, row: count - 1 - Math.min(count - 1, Math.floor(((y - top) / height) * count)) };
  }

  cell(seconds) {
    return this.state.map?.spans.findIndex(([start, end]) => seconds >= start && seconds < end) ?? -1;
  }

  #laid() {
    const { layers, head, sound } = this.state;
    const rows = Math.max(12, Math.min(30, 210 / Math.max(layers.length, 1)));
    const wanted = [
      ["words", sound.words.length ? 20 : 0],
      ["wave", 96],
      ["mel", 84],
      ["map", rows * layers.length],
      ["head", head ? 64 : 0],
    ].filter(([, height]) => height);
    let top = 6;
    this.lanes = {};
    wanted.forEach(([name, height]) => {
      this.lanes[name] = { top, height };
      top += height + (name === "words" ? 2 : 10);
    });
    return top + 16;
  }

  // ---------------------------------------------------------------- drawing

  draw() {
    if (!this.state.sound) return;
    const styles = getComputedStyle(this.#canvas);
    const names = ["ink", "soft", "line", "panel", "accent", "fall", "rise", "zero", "wave"];
    names.forEach((name) => { this.#colours[name] = styles.getPropertyValue(`--${name}`).trim(); });
    const height = this.#laid(), scale = devicePixelRatio || 1;
    this.#canvas.style.height = `${height}px`;
    this.#canvas.width = Math.round(this.width * scale);
    this.#canvas.height = Math.round(height * scale);
    const c = this.#context;
    c.setTransform(scale, 0, 0, scale, 0, 0);
    c.clearRect(0, 0, this.width, height);
    c.font = "12px system-ui, sans-serif";
    c.textBaseline = "middle";
    this.#drawWords();
    this.#drawWave();
    this.#drawMel();
    this.#drawMap();
    this.#drawHead();
    this.#drawTouches();
    this.#drawAxis(height);
    this.#drawSelection();
    this.#drawCursor(height);
  }

  #label(text, lane, colour = this.#colours.soft) {
    const c = this.#context;
    c.fillStyle = colour;
    c.textAlign = "right";
    c.fillText(text, LEFT - 8, lane.top + lane.height / 2);
  }

  #drawWords() {
    const lane = this.lanes.words, c = this.#context;
    if (!lane) return;
    c.textAlign = "center";
    this.state.sound.words.forEach(([start, end, label]) => {
      const [left, right] = [this.x(start), this.x(end)];
      c.fillStyle = this.#colours.line;
      c.beginPath(); c.roundRect(left, lane.top, right - left, lane.height, 5); c.fill();
      if (c.measureText(label).width > right - left) return;
      c.fillStyle = this.#colours.ink;
      c.fillText(label, (left + right) / 2, lane.top + lane.height / 2 + 1);
    });
  }

  #drawWave() {
    const lane = this.lanes.wave, c = this.#context, { samples } = this.state.sound;
    this.#label("sound", lane);
    const middle = lane.top + lane.height / 2, n = Math.floor(this.#inner);
    const loudest = Math.max(0.05, samples.reduce((most, x) => Math.max(most, Math.abs(x)), 0));
    c.fillStyle = this.#colours.wave;
    for (let i = 0; i < n; i++) {
      const from = Math.floor((i / n) * samples.length);
      const to = Math.max(from + 1, Math.floor(((i + 1) / n) * samples.length));
      let [low, high] = [0, 0];
      for (let at = from; at < to; at++) {
        low = Math.min(low, samples[at]); high = Math.max(high, samples[at]);
      }
      const half = (lane.height / 2 - 2) / loudest;
      c.fillRect(LEFT + i, middle - high * half, 1, Math.max(1, (high - low) * half));
    }
  }

  #drawMel() {
    const lane = this.lanes.mel, c = this.#context;
    this.#label("spectrum", lane);
    this.#spectrogram ??= this.#mel();
    c.imageSmoothingEnabled = true;
    c.save();
    c.beginPath(); c.roundRect(LEFT, lane.top, this.#inner, lane.height, 4); c.clip();
    c.drawImage(this.#spectrogram, LEFT, lane.top, this.#inner, lane.height);
    c.restore();
  }

  // the sound is another one
  heard() { this.#spectrogram = null; }

  #mel() {
    const { bands, db } = this.state.sound.mel, frames = db.length / bands;
    const image = new ImageData(Math.max(1, frames), bands);
    const [from, to] = [this.#colours.zero, this.#colours.ink].map(rgb);
    for (let t = 0; t < frames; t++) {
      for (let b = 0; b < bands; b++) {
        const level = (1 + db[t * bands + b] / 80) ** 1.6, at = 4 * ((bands - 1 - b) * frames + t);
        for (let i = 0; i < 3; i++) image.data[at + i] = from[i] + (to[i] - from[i]) * level;
        image.data[at + 3] = 255;
      }
    }
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [image.width, image.height];
    canvas.getContext("2d").putImageData(image, 0, 0);
    return canvas;
  }

  // the colour of a change of probability
  colour(change) {
    const { fall, rise, zero } = this.#colours;
    const share = Math.min(1, Math.abs(change) / this.state.limit) ** 0.8;
    const [from, to] = [rgb(zero), rgb(change < 0 ? fall : rise)];
    return `rgb(${from.map((x, i) => Math.round(x + (to[i] - x) * share)).join(" ")})`;
  }

  #drawMap() {
    const lane = this.lanes.map, c = this.#context, { map, layers } = this.state;
    if (!lane) return;
    const height = lane.height / layers.length;
    const every = Math.ceil(15 / height);
    c.save();
    c.beginPath(); c.roundRect(LEFT, lane.top, this.#inner, lane.height, 4); c.clip();
    c.fillStyle = this.#colours.panel;
    c.fillRect(LEFT, lane.top, this.#inner, lane.height);
    map?.spans.forEach(([start, end], t) => {
      const [left, right] = [this.x(start), this.x(Math.min(end, this.state.sound.seconds))];
      map.layers.forEach((layer, l) => {
        const change = map.change[l][t];
        if (change === null) return;
        c.fillStyle = this.colour(change);
        c.fillRect(left, lane.top + lane.height - (layer + 1) * height, right - left + 0.6, height + 0.6);
      });
    });
    c.restore();
    c.textAlign = "right";
    layers.forEach((layer, l) => {
      if (l % every) return;
      c.fillStyle = this.#colours.soft;
      c.fillText(`layer ${layer}`, LEFT - 8, lane.top + lane.height - (l + 0.5) * height);
    });
  }

  #drawHead() {
    const lane = this.lanes.head, c = this.#context, { head } = this.state;
    if (!lane) return;
    this.#label(`head ${head.layer}.${head.head}`, lane, this.#colours.accent);
    const density = head.share.map((x, i) => x / (head.edges[i + 1] - head.edges[i]));
    const most = Math.max(...density, 1e-9);
    const lit = head.spans ?? [];
    density.forEach((x, i) => {
      const [left, right] = [this.x(head.edges[i]), this.x(head.edges[i + 1])];
      const middle = (head.edges[i] + head.edges[i + 1]) / 2;
      const isLit = lit.some(([start, end]) => middle >= start && middle <= end);
      c.globalAlpha = isLit ? 1 : 0.4;
      c.fillStyle = this.#colours.accent;
      const tall = (x / most) * lane.height;
      c.fillRect(left, lane.top + lane.height - tall, Math.max(1, right - left - 0.5), tall);
    });
    c.globalAlpha = 1;
    c.fillStyle = this.#colours.line;
    c.fillRect(LEFT, lane.top + lane.height, this.#inner, 1);
  }

  // where stretches were touched
  #drawTouches() {
    const c = this.#context, { wave, mel, map } = this.lanes;
    this.state.touches.filter(({ kind }) => kind === "stretch").forEach((touch) => {
      const [left, right] = [this.x(touch.start_s), this.x(Math.min(touch.end_s, this.state.sound.seconds))];
      c.strokeStyle = this.#colours.accent;
      c.lineWidth = 2;
      if (touch.part === null) {
        c.fillStyle = this.#colours.accent;
        c.globalAlpha = 0.16;
        c.fillRect(left, wave.top, right - left, mel.top + mel.height - wave.top);
        c.globalAlpha = 1;
        c.fillRect(left, wave.top - 3, right - left, 3);
      } else if (touch.part === this.state.part && map) {
        const height = map.height / this.state.layers.length;
        c.strokeRect(left, map.top + map.height - (touch.layer + 1) * height, right - left, height);
      }
    });
  }

  #drawAxis(height) {
    const c = this.#context, { seconds } = this.state.sound;
    const most = Math.max(2, Math.floor(this.#inner / 56));
    const step = [0.1, 0.2, 0.25, 0.5, 1, 2, 5, 10, 20, 30].find((one) => seconds / one <= most) ?? 60;
    c.fillStyle = this.#colours.soft;
    c.textAlign = "center";
    for (let at = 0; at <= seconds + 1e-6; at += step) {
      if (this.x(at) > this.width - 14) break;
      c.fillText(`${+at.toFixed(2)}${at === 0 ? " s" : ""}`, this.x(at), height - 9);
    }
  }

  #drawSelection() {
    const { selection } = this.state, c = this.#context;
    if (!selection) return;
    const { wave, mel, map } = this.lanes;
    const [left, right] = [this.x(selection.start), this.x(selection.end)];
    c.strokeStyle = this.#colours.ink;
    c.lineWidth = 1.5;
    c.fillStyle = this.#colours.accent;
    c.globalAlpha = 0.22;
    const bottom = (map ?? mel).top + (map ?? mel).height;
    c.fillRect(left, wave.top, right - left, mel.top + mel.height - wave.top);
    c.globalAlpha = 1;
    c.beginPath();
    [left, right].forEach((x) => { c.moveTo(x, wave.top); c.lineTo(x, bottom); });
    c.stroke();
    if (map && selection.layer !== null && selection.part === this.state.part) {
      const height = map.height / this.state.layers.length;
      c.lineWidth = 2.5;
      c.strokeRect(left, map.top + map.height - (selection.layer + 1) * height, right - left, height);
    }
  }

  #drawCursor(height) {
    if (this.cursor === null) return;
    const c = this.#context;
    c.fillStyle = this.#colours.accent;
    c.fillRect(this.x(this.cursor) - 1, this.lanes.wave.top, 2, height - 24 - this.lanes.wave.top);
  }
}

// "#rrggbb" as three numbers
function rgb(hex) {
  return [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
}
