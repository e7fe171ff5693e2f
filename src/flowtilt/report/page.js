"use strict";
// Read-outs on hovering; the page says the same without them in its captions and tables.
for (const plot of document.querySelectorAll(".plot[data-read]")) {
  const points = JSON.parse(plot.dataset.read);
  if (!points.length) continue;
  const tip = document.createElement("div"), dot = document.createElement("div");
  tip.className = "tip";
  dot.className = "spot";
  tip.hidden = dot.hidden = true;
  plot.append(dot, tip);
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const dx = (p) => (p[0] / 100) * box.width - (event.clientX - box.left);
    const dy = (p) => ("several" in plot.dataset ? (p[1] / 100) * box.height - (event.clientY - box.top) : 0);
    const away = (p) => Math.hypot(dx(p), dy(p));
    const [x, y, text] = points.reduce((best, p) => (away(p) < away(best) ? p : best));
    tip.hidden = dot.hidden = false;
    tip.textContent = text;
    dot.style.left = x + "%";
    dot.style.top = y + "%";
    const left = (x / 100) * box.width - tip.offsetWidth / 2;
    tip.style.left = Math.max(0, Math.min(box.width - tip.offsetWidth, left)) + "px";
    tip.style.top = y > 30 ? `calc(${y}% - 34px)` : `calc(${y}% + 12px)`;
  });
  plot.addEventListener("pointerleave", () => (tip.hidden = dot.hidden = true));
}
