// Sound of a page's clips by Web Audio: stretches exact to the sample.
// Clips are {flac: base64} or, without it, the difference of the first two.

class Sound {
  #context = null;
  #buffers = [];
  #playing = null; // {source, start, end, began}

  constructor(clips, rate) {
    this.clips = clips;
    this.rate = rate;
    this.current = 0;
    this.onmove = () => {}; // called with the seconds now heard, while playing
    this.onstop = () => {}; // called with the seconds at which it stopped
  }

  get isPlaying() { return this.#playing !== null; }

  // seconds now heard, null while nothing plays
  get seconds() {
    const { start, end, began } = this.#playing ?? {};
    return this.#playing && Math.min(start + this.#context.currentTime - began, end);
  }

  // play [start, end) seconds of the current clip, to its end by default; a band [low, high] in Hz
  // lets only that part of the spectrum through
  async play(start = 0, end = Infinity, band = null) {
    const buffer = await this.#buffer(this.current);
    this.stop();
    const source = new AudioBufferSourceNode(this.#context, { buffer });
    this.#through(band, source).connect(this.#context.destination);
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

  #ended() {
    const at = this.seconds;
    this.#playing = null;
    this.onstop(at);
  }

  #follow() {
    if (!this.#playing) return;
    this.onmove(this.seconds);
    requestAnimationFrame(() => this.#follow());
  }

  #through(band, source) {
    if (!band) return source;
    const low = new BiquadFilterNode(this.#context, { type: "highpass", frequency: band[0] });
    const high = new BiquadFilterNode(this.#context, { type: "lowpass", frequency: band[1] });
    return source.connect(low).connect(high);
  }

  async #buffer(index) {
    this.#context ??= new AudioContext({ sampleRate: this.rate });
    await this.#context.resume();
    const { flac } = this.clips[index];
    return (this.#buffers[index] ??= flac
      ? await this.#context.decodeAudioData(fromBase64(flac).buffer)
      : await this.#difference());
  }

  async #difference() {
    const [one, two] = [await this.#buffer(0), await this.#buffer(1)];
    const length = Math.max(one.length, two.length);
    const buffer = new AudioBuffer({ length, sampleRate: this.rate });
    const samples = buffer.getChannelData(0);
    samples.set(one.getChannelData(0));
    two.getChannelData(0).forEach((level, i) => { samples[i] -= level; });
    return buffer;
  }
}
