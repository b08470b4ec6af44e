// The explorer as a notebook's widget: messages go to the kernel, events come back by their number.

class KernelLink {
  #asked = new Map(); // number: {events, wake}
  #model; #next;

  constructor(model) {
    this.#model = model;
    this.#next = `${Math.random()}:`;
    model.on("msg:custom", ({ number, event }) => {
      const asked = this.#asked.get(number);
      asked?.events.push(event);
      asked?.wake();
    });
  }

  async* ask(message, content = null) {
    const number = `${this.#next}${this.#asked.size}:${performance.now()}`;
    const asked = { events: [], wake: () => {} };
    this.#asked.set(number, asked);
    try {
      const told = content === null ? message : { ...message, do: "clip" };
      this.#model.send({ number, message: told }, undefined, content === null ? [] : [content]);
      while (true) {
        if (!asked.events.length) await new Promise((wake) => { asked.wake = wake; });
        const event = asked.events.shift();
        if (event === undefined) continue;
        if (event === null) return;
        yield event;
      }
    } finally {
      this.#asked.delete(number);
    }
  }
}

export default {
  render({ model, el }) {
    const root = document.createElement("div");
    el.append(root);
    return mount(root, new KernelLink(model));
  },
};
