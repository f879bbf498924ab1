// Reading: it arranges what chat.js has put into the log, follows it to the end, counts what is unread,
// and takes it home. From chat.js it has $, chat, text, me, unsent, stored and is.
"use strict";

const log = $("log"), scroller = $("scroller");
const title = document.title;
const all = (what) => document.querySelectorAll(what);
const arrivals = (records) => records.flatMap((record) => [...record.addedNodes]);

function element(name, text, set = {}) {
  return Object.assign(document.createElement(name), { textContent: text }, set);
}

const KEPT = 500; // entries in the page: browsers get slow with thousands
const LINES = 24; // of a message; what has more is shown when asked for
const MINUTES_OF_A_GROUP = 5;
// One of each, and not toLocaleString, which makes one each time: for 500 entries that took 120 ms.
const CLOCK = new Intl.DateTimeFormat([], { hour: "2-digit", minute: "2-digit", hourCycle: "h23" });
const DAY = new Intl.DateTimeFormat([], { dateStyle: "full" });
const STAMP = new Intl.DateTimeFormat("sv", { dateStyle: "short", timeStyle: "medium" }); // 2026-11-23 14:05:09
const NAMES = new Intl.ListFormat("en-GB");
const removed = []; // lines of the transcript whose entries are no longer in the page
const hidden = new Set(stored.hidden); // members whose messages are not to be seen here
const unreadLine = element("li", "New", { className: "unread" });
unreadLine.setAttribute("aria-hidden", "true");
let atEnd = true; // the reader is at the end of the log, which then follows what is new
let unread = 0; // messages that came while nobody looked
let size = ""; // of the log, when we last followed it

const looking = () => document.hasFocus() && !document.hidden;

function arrange(li) {
  const time = li.querySelector("time"), before = li.previousElementSibling;
  if (!time) return; // a gap
  const when = (li.date = new Date(time.dateTime)); // not li.when, which newer browsers have themselves
  const day = when.toDateString();
  time.textContent = CLOCK.format(when);
  if (day !== (before?.date ?? new Date()).toDateString())
    li.before(element("li", DAY.format(when), { className: "day" }));
  if (li.dataset.from) arrangeMessage(li, before);
  else arrangeNotice(li, before, time);
}

function arrangeMessage(li, before) {
  const { from } = li.dataset, said = li.querySelector(".text");
  li.hidden = hidden.has(from);
  const close = li.date - before?.date < MINUTES_OF_A_GROUP * 60_000;
  li.classList.toggle("more", close && before.dataset.from === from);
  if (said.textContent.split("\n").length > LINES) {
    li.classList.add("long");
    li.append(element("button", "Show all", { className: "all", type: "button" }));
  }
  for (const span of $("typing").querySelectorAll(`[data-typing="${from}"]`)) span.remove();
  if (li.hidden || from === me?.member || (atEnd && looking())) return;
  if (!unread) {
    li.before(unreadLine);
    li.classList.remove("more"); // below the line the name is needed again
  }
  unread += 1;
  notify(li.querySelector(".who").textContent, said.textContent);
}

// Thirty who come at once are one line: the first notice in a row speaks for those that follow.
function arrangeNotice(li, before, time) {
  const { what } = li.dataset;
  li.said = li.textContent.replace(time.textContent, "").trim(); // for the transcript
  if (!["joined", "left"].includes(what)) return;
  const first = (li.first = before?.first ?? li);
  first.who ??= { joined: new Set(), left: new Set() };
  const who = li.querySelector(".who").textContent;
  first.who[what].add(who);
  if (what === "joined") first.who.left.delete(who); // and is back
  li.hidden = li !== first;
  const { joined, left } = first.who;
  const both = joined.size && left.size ? [", "] : [];
  first.replaceChildren(...names(joined, " joined"), ...both, ...names(left, " left"), " ", first.querySelector("time"));
}

function names(set, what) {
  if (!set.size) return [];
  const some = set.size > 3 ? [...[...set].slice(0, 2), `${set.size - 2} others`] : set;
  const parts = NAMES.formatToParts(some);
  return [...parts.map(({ type, value }) => (type === "element" ? element("bdi", value) : value)), what];
}

function toEnd() {
  atEnd = true;
  unread = 0;
  follow();
}

const sizeOf = ({ clientWidth, clientHeight }) => `${clientWidth} × ${clientHeight}`;
const nearEnd = () => scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 50;

function follow(move = true) {
  if (atEnd && move) {
    const end = scroller.scrollHeight - scroller.clientHeight;
    const start = unread ? unreadLine.offsetTop : end; // not past what nobody has read
    scroller.scrollTop = Math.min(end, start);
    atEnd = start >= end;
  }
  if (atEnd && looking()) unread = 0;
  $("new").hidden = atEnd;
  $("new").textContent = unread ? `${unread} new` : "Newest";
  document.title = (unread ? `(${unread}) ` : "") + title;
  const icon = unread ? chat.dataset.unread : chat.dataset.icon;
  if ($("icon").getAttribute("href") !== icon) $("icon").setAttribute("href", icon);
}

new MutationObserver((records) => {
  arrivals(records).filter((node) => node.isConnected && node.dataset?.seq).forEach(arrange);
  while (log.children.length > (atEnd ? KEPT : 4 * KEPT)) {
    const oldest = log.firstElementChild;
    if (oldest.dataset.seq) removed.push(line(oldest));
    oldest.remove();
    $("bounds").textContent = "Earlier messages are no longer shown here. They are in the transcript.";
  }
  invite();
  follow();
  setTimeout(() => $("live").setAttribute("aria-live", "polite"), 1000); // the history has been put in
}).observe(log, { childList: true });
new MutationObserver(() => follow()).observe($("unsent"), { childList: true });
new ResizeObserver(() => {
  size = sizeOf(scroller);
  atEnd ||= nearEnd();
  follow();
}).observe(scroller);

scroller.addEventListener("scroll", () => {
  if (sizeOf(scroller) !== size) return; // not the reader has moved: the window has changed
  atEnd = nearEnd();
  follow(false); // or a key, which moves it by less, could never leave the end
});
log.addEventListener("click", ({ target }) => {
  if (target.className !== "all") return;
  target.closest("li").classList.remove("long");
  target.remove();
});
log.addEventListener("pointerover", ({ target }) => {
  const li = target.closest("li");
  if (li?.date) li.title = li.date.toLocaleString(); // only now: it is slow, and not for the ear
});
addEventListener("focus", () => follow());
document.addEventListener("visibilitychange", () => follow());
$("new").addEventListener("click", () => {
  toEnd();
  scroller.focus(); // the button goes, and the focus with it
});

const canNotify = window.isSecureContext && "Notification" in window;
const pressed = (button) => button.getAttribute("aria-pressed") === "true";
$("notify").hidden = !canNotify;
$("notify").addEventListener("click", async ({ currentTarget: button }) => {
  const wanted = !pressed(button) && (await Notification.requestPermission()) === "granted";
  button.setAttribute("aria-pressed", wanted);
});

function notify(name, body) {
  if (!pressed($("notify")) || looking()) return;
  try {
    new Notification(`${name} in ${title}`, { body, tag: title });
  } catch {} // Chrome on Android wants a service worker for it
}

// ── Taking it home ──

function line(li) {
  const when = li.date ? `[${STAMP.format(li.date)}] ` : "";
  if (!li.dataset.from) return `${when}* ${li.said ?? li.textContent}`;
  // A new line in a message must not look like a line of somebody else.
  const said = li.querySelector(".text").textContent.replaceAll("\n", "\n    ");
  return `${when}${li.querySelector(".who").textContent}: ${said}`;
}

function save() {
  const entries = [...log.children].filter((li) => li.dataset.seq).map(line);
  const texts = [...unsent.map((message) => message.text), text.value].filter(Boolean);
  const waiting = texts.map((text) => `[not sent] ${text.replaceAll("\n", "\n    ")}`);
  const file = new Blob([[...removed, ...entries, ...waiting, ""].join("\n")], { type: "text/plain" });
  const anchor = document.createElement("a");
  anchor.href = URL.createObjectURL(file);
  anchor.download = `${title}, ${new Date().toLocaleDateString("sv")}.txt`;
  anchor.click();
  setTimeout(() => URL.revokeObjectURL(anchor.href), 1000);
}
for (const button of all(".save")) button.addEventListener("click", save);
