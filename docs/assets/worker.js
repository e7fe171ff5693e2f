// Browsers start no workers on pages that are opened from disk. There, a worker of the search becomes a hidden frame.
if (location.protocol === "file:") {
  window.Worker = class {
    constructor(url) {
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      document.body.appendChild(this.frame)
      const inner = this.frame.contentWindow
      const deliver = data => setTimeout(() => this.onmessage?.(new MessageEvent("message", { data: structuredClone(data) })))
      inner.postMessage = deliver
      inner.importScripts = (...urls) => Promise.all(urls.map(one => new Promise((done, failed) => {
        const script = inner.document.createElement("script")
        Object.assign(script, { src: one, onload: done, onerror: failed })
        inner.document.body.appendChild(script)
      })))
      this.ready = inner.importScripts(url)
    }
    postMessage(data) {
      this.ready.then(() => {
        const inner = this.frame.contentWindow
        inner.dispatchEvent(new inner.MessageEvent("message", { data: inner.structuredClone(data) }))
      })
    }
    terminate() { this.frame.remove() }
  }
}
