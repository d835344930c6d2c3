// Searching from a folder. The theme searches in a Worker, and browsers start none for a page that was opened as a file.
// Here it is a hidden frame of the page that says and hears the same.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.waiting = [];
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      this.frame.srcdoc = "<!doctype html>";
      this.frame.addEventListener("load", () => this.start(String(url)), { once: true });
      const place = () => document.body.appendChild(this.frame);
      document.body ? place() : document.addEventListener("DOMContentLoaded", place);
    }

    start(url) {
      const inner = this.frame.contentWindow;
      const load = (name) =>
        new Promise((done, failed) => {
          const script = inner.document.createElement("script");
          Object.assign(script, { src: name, onload: done, onerror: failed });
          inner.document.head.appendChild(script);
        });
      inner.postMessage = (data) => this.tell(this, data);
      inner.importScripts = (...names) => names.reduce((before, name) => before.then(() => load(name)), Promise.resolve());
      load(url).then(
        () => {
          const waiting = this.waiting;
          this.waiting = null;
          waiting.forEach((data) => this.tell(inner, data));
        },
        () => this.dispatchEvent(new Event("error")),
      );
    }

    tell(target, data) {
      const kind = target === this ? MessageEvent : target.MessageEvent;
      const event = new kind("message", { data });
      target.dispatchEvent(event);
      if (typeof target.onmessage === "function") target.onmessage(event);
    }

    postMessage(data) {
      this.waiting ? this.waiting.push(data) : this.tell(this.frame.contentWindow, data);
    }

    terminate() {
      this.frame.remove();
    }
  };
}
