// What makes the page pleasant: reading, writing, inviting, taking the talk home. It looks at what
// chat.js, which comes first, has put into the page, and says who is typing; the chat works without it.
"use strict";

const log = $("log"), scroller = $("scroller");
const link = location.origin + location.pathname;
const title = document.title;

// ── Reading ──

const KEPT = 500; // entries in the page: browsers get slow with thousands
const MINUTES_OF_A_GROUP = 5;
const removed = []; // lines of the transcript whose entries are no longer in the page
let atEnd = true; // the reader is at the end of the log, which then follows what is new
let unread = 0; // messages that came while nobody looked
const unreadLine = document.createElement("li");
unreadLine.className = "unread";
unreadLine.textContent = "New";
unreadLine.ariaHidden = true;

function arrange(li) {
  const time = li.querySelector("time"), before = li.previousElementSibling;
  if (!time) return; // a gap
  const when = (li.when = new Date(time.dateTime));
  time.textContent = when.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", hourCycle: "h23" });
  time.title = li.title = when.toLocaleString();
  const { from } = li.dataset;
  if (!from) return;
  const close = when - before?.when < MINUTES_OF_A_GROUP * 60_000;
  li.classList.toggle("more", close && before.dataset.from === from);
  document.querySelector(`[data-typing="${from}"]`)?.remove();
  if (from === me?.member || (atEnd && !document.hidden)) return;
  if (!unread) {
    li.before(unreadLine);
    li.classList.remove("more"); // below the line the name is needed again
  }
  unread += 1;
}

function toEnd() {
  atEnd = true;
  unread = 0;
  follow();
}

function follow(move = true) {
  if (atEnd && move) {
    const end = scroller.scrollHeight - scroller.clientHeight;
    const start = unread ? unreadLine.offsetTop : end; // not past what nobody has read
    scroller.scrollTop = Math.min(end, start);
    atEnd = start >= end;
  }
  if (atEnd && !document.hidden) unread = 0;
  $("new").hidden = atEnd || !unread;
  $("new").textContent = `${unread} new`;
  document.title = (unread ? `(${unread}) ` : "") + title;
}

new MutationObserver((records) => {
  const nodes = records.flatMap((record) => [...record.addedNodes]);
  // What had been shown before, chat.js has taken out again by now.
  nodes.filter((node) => node.isConnected && node.dataset?.seq).forEach(arrange);
  while (log.children.length > (atEnd ? KEPT : 4 * KEPT)) {
    const oldest = log.firstElementChild;
    if (oldest !== unreadLine) removed.push(line(oldest));
    oldest.remove();
    $("bounds").textContent = "Earlier messages are no longer shown here. They are in the transcript.";
  }
  follow();
  setTimeout(() => ($("live").ariaLive = "polite"), 1000); // the history has been put in
}).observe(log, { childList: true });
new MutationObserver(() => follow()).observe($("unsent"), { childList: true });
new ResizeObserver(() => follow()).observe(scroller);

scroller.addEventListener("scroll", () => {
  atEnd = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 50;
  follow(false); // or a key, which moves it by less, could never leave the end
});
document.addEventListener("visibilitychange", () => follow());
$("new").addEventListener("click", () => {
  toEnd();
  scroller.focus(); // the button goes, and the focus with it
});

// ── Writing ──

const TYPING_TELLS = 3000, TYPING_LASTS = 6000; // milliseconds; an end needs no frame, and cannot get lost
let told = 0;

text.addEventListener("input", () => {
  const length = [...text.value.normalize("NFC")].length, most = Number(text.dataset.most);
  text.setCustomValidity(length > most ? `${length - most} characters too many. Please send it in parts.` : "");
  $("counter").textContent = length > 0.9 * most ? `${length} of ${most} characters` : "";
  if (!CSS.supports("field-sizing", "content")) {
    text.style.height = "auto";
    text.style.height = `${text.scrollHeight + 2}px`;
  }
  if (!text.value || !joined || Date.now() - told < TYPING_TELLS) return;
  told = Date.now();
  send({ typing: true });
});
$("composer").addEventListener("submit", () => {
  told = 0;
  toEnd();
});
new MutationObserver((records) => {
  for (const node of records.flatMap((record) => [...record.addedNodes])) {
    const member = node.dataset.typing;
    for (const old of document.querySelectorAll(`[data-typing="${member}"]`))
      if (old !== node || member === me?.member) old.remove();
    setTimeout(() => node.remove(), TYPING_LASTS);
  }
}).observe($("typing"), { childList: true });

// ── Inviting ──

async function copy() {
  try {
    await navigator.clipboard.writeText(link);
  } catch {
    // Without https there is no clipboard, but the old way of copying what is selected.
    if (!$("invite").open) $("invite").showModal();
    $("link").select();
    if (!document.execCommand("copy")) return ($("copied").textContent = "Copy the link that is marked.");
  }
  $("copied").textContent = $("status").textContent = "The link is copied.";
}
for (const button of document.querySelectorAll(".copy")) button.addEventListener("click", copy);
$("link").value = link;
$("open-invite").addEventListener("click", () => $("invite").showModal());
$("close-invite").addEventListener("click", () => $("invite").close());
$("share").hidden = !navigator.share;
$("share").addEventListener("click", () => navigator.share({ title, url: link }).catch(() => {}));
$("qr").addEventListener("click", () => $("invite").classList.toggle("full"));
$("invite").addEventListener("close", () => {
  $("invite").classList.remove("full");
  $("copied").textContent = "";
});

// ── Taking it home ──

function line(li) {
  const when = li.when && `[${li.when.toLocaleString("sv")}] `; // 2026-11-23 14:05:09
  if (!li.dataset.from) return `${when ?? ""}* ${li.firstChild.textContent}`;
  return `${when}${li.querySelector(".who").textContent}: ${li.querySelector(".text").textContent}`;
}

function save() {
  const entries = [...log.children].filter((li) => li !== unreadLine).map(line);
  const texts = [...unsent.map((message) => message.text), text.value].filter(Boolean);
  const waiting = texts.map((text) => `[not sent] ${text}`);
  const file = new Blob([[...removed, ...entries, ...waiting, ""].join("\n")], { type: "text/plain" });
  const anchor = document.createElement("a");
  anchor.href = URL.createObjectURL(file);
  anchor.download = `${title}, ${new Date().toLocaleDateString("sv")}.txt`;
  anchor.click();
  setTimeout(() => URL.revokeObjectURL(anchor.href), 1000);
}
for (const button of document.querySelectorAll(".save")) button.addEventListener("click", save);

$("presence").open = innerWidth > 700;
text.dispatchEvent(new Event("input")); // the draft, which chat.js has put there
