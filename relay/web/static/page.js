// What a script adds: times in the viewer's zone, live rows, filters without a reload, progress,
// keys. Every page works without it.
"use strict";

const two = (number) => String(number).padStart(2, "0");

function localTimes(root) {
  for (const time of root.querySelectorAll("time[datetime]:not([data-local])")) {
    const at = new Date(time.dateTime);
    if (Number.isNaN(at.getTime())) continue;
    const day = `${at.getFullYear()}-${two(at.getMonth() + 1)}-${two(at.getDate())}`;
    time.textContent = `${day} ${two(at.getHours())}:${two(at.getMinutes())}:${two(at.getSeconds())}`;
    time.dataset.local = "";
  }
}

// The log, as it goes on.

let stream = null;

function follow() {
  if (stream) stream.close();
  stream = null;
  const place = document.getElementById("follow");
  const rows = document.querySelector("#results .rows");
  if (!place || !rows || "off" in place.dataset) return;
  let paused = false;
  const button = document.createElement("button");
  button.className = "quiet";
  const said = document.createElement("span");
  place.replaceChildren(said, button);
  const tell = () => {
    said.textContent = paused ? "Paused" : "Following";
    button.textContent = paused ? "Follow" : "Pause";
  };
  button.addEventListener("click", () => {
    paused = !paused;
    tell();
    if (!paused) location.reload();
  });
  tell();
  stream = new EventSource(place.dataset.live);
  stream.onmessage = (message) => {
    if (paused) return;
    const news = JSON.parse(message.data);
    if (news.left_out) {
      const gap = document.createElement("div");
      gap.className = "gap";
      gap.textContent = `${news.left_out} more events came than could be shown; reload to see them.`;
      rows.prepend(gap);
    }
    const box = document.createElement("div");
    box.innerHTML = news.rows;
    localTimes(box);
    const fresh = [...box.children].filter((row) => !document.getElementById(row.id));
    for (const row of fresh) row.classList.add("new");
    rows.prepend(...fresh);
    while (rows.children.length > 300) rows.lastElementChild.remove();
    if (fresh.length) document.querySelector("#results > .empty")?.remove();
  };
  stream.onerror = () => {
    const isOver = stream.readyState === EventSource.CLOSED;
    said.textContent = isOver ? "Not following: reload, or sign in again" : "Not following: the relay does not answer";
  };
}

// Filters without a reload.

const filters = document.getElementById("filters");

async function filter() {
  const query = new URLSearchParams(new FormData(filters));
  for (const [name, value] of [...query]) if (!value) query.delete(name);
  const place = `/log?${query}`;
  const answer = await fetch(place);
  if (!answer.ok || answer.redirected) {
    location.assign(place);
    return;
  }
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  history.replaceState(null, "", place);
  for (const id of ["results", "follow"]) {
    document.getElementById(id).replaceWith(page.getElementById(id));
  }
  localTimes(document);
  follow();
}

if (filters) {
  let wait = 0;
  filters.addEventListener("submit", (event) => {
    event.preventDefault();
    filter();
  });
  filters.addEventListener("input", () => {
    clearTimeout(wait);
    wait = setTimeout(filter, 300);
  });
}

// Marks, and progress.

const all = document.querySelector("[data-all]");
if (all) {
  all.hidden = false;
  all.addEventListener("change", () => {
    for (const box of document.querySelectorAll("input[name=id]")) box.checked = all.checked;
  });
}

if (document.querySelector("[data-running]")) setTimeout(() => location.reload(), 1000);

// Keys.

function step(by) {
  const rows = [...document.querySelectorAll(".row summary, tbody th a")];
  const here = rows.indexOf(document.activeElement);
  rows[Math.min(Math.max(here + by, 0), rows.length - 1)]?.focus();
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.closest("input, select, textarea")) return;
  if (event.key === "/") document.getElementById("q")?.focus();
  else if (event.key === "j") step(1);
  else if (event.key === "k") step(-1);
  else if (event.key === "?") location.assign("/help");
  else return;
  event.preventDefault();
});

localTimes(document);
follow();
