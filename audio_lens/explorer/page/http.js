// The explorer as a page: messages go to its own server, events come back a line at a time.

class HttpLink {
  async* ask(message, content = null) {
    const address = content === null ? "do" : `clip?${new URLSearchParams(message)}`;
    const body = content ?? JSON.stringify(message);
    const response = await fetch(address, { method: "POST", body });
    if (!response.body || !response.headers.get("content-type")?.includes("ndjson")) {
      throw new Error(`the server answers ${response.status}`);
    }
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    try {
      while (true) {
        const { value, done } = await reader.read();
        if (done) break;
        const lines = (rest + value).split("\n");
        rest = lines.pop();
        for (const line of lines) yield JSON.parse(line);
      }
    } finally {
      reader.cancel().catch(() => {}); // the server may be gone
    }
  }
}

mount(document.getElementById("explorer"), new HttpLink());
