
// Says what stands under the pointer of a chart or strip. Without it the page says everything but single values.
"use strict";
const tip = document.getElementById("tip");
const read = (element, name) => JSON.parse(element.dataset[name] || "[]");

function nearest(places, at) {
  let best = 0;
  for (let i = 1; i < places.length; i++) if (Math.abs(places[i] - at) < Math.abs(places[best] - at)) best = i;
  return best;
}

function words(host, i) {
  const lines = [read(host, "labels")[i]], names = read(host, "names");
  read(host, "values").forEach((values, k) => {
    if (values[i] !== null) lines.push(`${names[k]} ${values[i]}`);
  });
  return lines.join("\n");
}

function attach(host) {
  const area = host.querySelector(".area"), places = read(host, "places");
  if (!places.length) return;
  const cursor = document.createElement("i");
  cursor.className = "cursor";
  cursor.hidden = true;
  area.append(cursor);
  area.addEventListener("pointermove", (event) => {
    const box = area.getBoundingClientRect();
    const i = nearest(places, (100 * (event.clientX - box.left)) / box.width);
    cursor.style.left = `${places[i]}%`;
    tip.textContent = words(host, i);
    cursor.hidden = tip.hidden = false;
    const left = box.left + (box.width * places[i]) / 100 + 10;
    const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
    tip.style.left = `${Math.max(8, Math.min(left, room))}px`;
    tip.style.top = `${window.scrollY + box.top - tip.offsetHeight - 6}px`;
  });
  area.addEventListener("pointerleave", () => (cursor.hidden = tip.hidden = true));
}

document.querySelectorAll(".chart, .strip").forEach(attach);
