// Sound of the explorer by Web Audio: samples in memory, stretches exact to the sample.

class Player {
  #context = null;
  #playing = null; // {source, start, end, began}

  constructor() {
    this.onmove = () => {}; // called with the seconds now heard, and with null when it stops
  }

  get isPlaying() { return this.#playing !== null; }

  // play [start, end) seconds of samples
  async play({ samples, rate }, start = 0, end = Infinity) {
    this.#context ??= new AudioContext({ sampleRate: rate });
    await this.#context.resume();
    this.stop();
    const buffer = new AudioBuffer({ length: Math.max(samples.length, 1), sampleRate: rate });
    buffer.getChannelData(0).set(samples);
    const source = new AudioBufferSourceNode(this.#context, { buffer });
    source.connect(this.#context.destination);
    const until = Math.min(end, buffer.duration);
    const playing = { source, start, end: until, began: this.#context.currentTime };
    source.onended = () => { if (this.#playing === playing) this.#ended(); };
    this.#playing = playing;
    source.start(0, start, until - start);
    this.#follow();
  }

  stop() {
    if (!this.#playing) return;
    this.#playing.source.stop();
    this.#ended();
  }

  // a sound file of any kind that the browser knows, as samples at a rate
  async decoded(bytes, rate) {
    const context = new OfflineAudioContext(1, 1, rate);
    const buffer = await context.decodeAudioData(bytes);
    const samples = new Float32Array(buffer.length);
    for (let i = 0; i < buffer.numberOfChannels; i++) {
      buffer.getChannelData(i).forEach((level, at) => { samples[at] += level / buffer.numberOfChannels; });
    }
    return samples;
  }

  #ended() {
    this.#playing = null;
    this.onmove(null);
  }

  #follow() {
    if (!this.#playing) return;
    const { start, end, began } = this.#playing;
    this.onmove(Math.min(start + this.#context.currentTime - began, end));
    requestAnimationFrame(() => this.#follow());
  }
}

// samples as a 16-bit wav file
function wavOf(samples, rate) {
  const view = new DataView(new ArrayBuffer(44 + 2 * samples.length));
  const text = (at, letters) => [...letters].forEach((c, i) => view.setUint8(at + i, c.charCodeAt(0)));
  text(0, "RIFF"); view.setUint32(4, 36 + 2 * samples.length, true); text(8, "WAVEfmt ");
  view.setUint32(16, 16, true); view.setUint16(20, 1, true); view.setUint16(22, 1, true);
  view.setUint32(24, rate, true); view.setUint32(28, 2 * rate, true);
  view.setUint16(32, 2, true); view.setUint16(34, 16, true);
  text(36, "data"); view.setUint32(40, 2 * samples.length, true);
  samples.forEach((level, i) => {
    view.setInt16(44 + 2 * i, Math.round(Math.max(-1, Math.min(1, level)) * 32767), true);
  });
  return view.buffer;
}

// the stretches that hold a part of what a head gives to the clip: [[start, end], ...]
function attended(edges, share, part) {
  const total = share.reduce((sum, x) => sum + x, 0);
  const density = (i) => share[i] / (edges[i + 1] - edges[i]);
  const order = [...share.keys()].sort((a, b) => density(b) - density(a));
  const chosen = new Set();
  let held = 0;
  for (const i of order) {
    if (held >= part * total) break;
    chosen.add(i);
    held += share[i];
  }
  const spans = [];
  [...chosen].sort((a, b) => a - b).forEach((i) => {
    const last = spans.at(-1);
    if (last && edges[i] - last[1] < 0.06) last[1] = edges[i + 1];
    else spans.push([edges[i], edges[i + 1]]);
  });
  return spans;
}

// a sound in which only some stretches are loud: the rest is quiet, or cut away
function litUp({ samples, rate }, spans, isCut) {
  const [quiet, pad, fade] = [0.12, 0.04, 0.01];
  const gain = new Float32Array(samples.length).fill(isCut ? 0 : quiet);
  spans.forEach(([start, end]) => {
    const [from, to] = [Math.max(0, (start - pad) * rate), Math.min(samples.length, (end + pad) * rate)];
    for (let i = Math.floor(from); i < to; i++) {
      const rise = Math.min((i - from) / rate, (to - i) / rate) / fade;
      gain[i] = Math.max(gain[i], Math.min(1, rise));
    }
  });
  const lit = samples.map((level, i) => level * gain[i]);
  return { samples: isCut ? lit.filter((_, i) => gain[i] > 0) : lit, rate };
}
