// The browser's half of the chat. It opens the WebSocket, says who we are, sends what we write until
// it has been confirmed, and tells the truth about the connection. What arrives are fragments of
// HTML, which htmx puts into the page. What makes it pleasant is in read.js and page.js.
"use strict";

const $ = (id) => document.getElementById(id);
const chat = $("chat"), text = $("text");
const KEYBOARD = !matchMedia("(pointer: coarse)").matches; // on glass, focus would bring one up

// One tab is one member: sessionStorage survives a reload and is not shared with other tabs. Where it
// is forbidden or full, all goes on until the next reload.
const stored = {};
try {
  Object.assign(stored, JSON.parse(sessionStorage.getItem(chat.dataset.code)));
} catch {}

function store(what) {
  Object.assign(stored, what);
  try {
    sessionStorage.setItem(chat.dataset.code, JSON.stringify(stored));
  } catch {}
}

let me = stored.me; // {member, token}, once the server has welcomed us
// Said with our name: if we say that again, because the welcome got lost, we are no second member.
store({ key: stored.key || crypto.getRandomValues(new Uint32Array(4)).join("-") });
let last = 0; // seq of the newest entry shown

// ── The state ──
// outside ─▶ entering ─▶ connected ◀─▶ reconnecting, with which a reload begins, too. From each of
// them to closed, for good; and back outside if the server does not want us.

const is = (...names) => names.includes(chat.dataset.state);

function state(name, sentence = "") {
  chat.dataset.state = name;
  $("status").textContent = sentence;
}

let telling; // the timer of tell

// Say for a moment what changes nothing.
function tell(sentence) {
  clearTimeout(telling);
  $("told").textContent = sentence;
  telling = setTimeout(() => $("told").replaceChildren(), 3000);
}

// ── The connection ──

let socket = null; // the one that counts; an older one is no longer listened to
let tries = 0, timer = 0, retryAt = 0; // since we were connected; when the next one is due
let heard; // when something came last

function dial() {
  if (!window.htmx) return; // on a slow line it comes after us; DOMContentLoaded will dial
  letGo();
  heard = Date.now();
  socket = new WebSocket(`${location.origin.replace("http", "ws")}/r/${chat.dataset.code}/ws`);
  socket.onopen = hello;
  socket.onmessage = arrive;
  socket.onclose = closed;
  chat.dispatchEvent(new CustomEvent("dial", { detail: socket })); // for the wire view
}

function hello() {
  return send({ hello: me ? { token: me.token, after: last } : { name: $("name").value, key: stored.key } });
}

function send(frame) {
  if (socket?.readyState !== WebSocket.OPEN) return false;
  socket.send(JSON.stringify(frame));
  return true;
}

// Hear no more of the old line, and try no more to get a new one.
function letGo() {
  clearTimeout(timer);
  if (socket) socket.onopen = socket.onmessage = socket.onclose = null;
}

// Each try waits about twice as long as the one before. By chance, or after a restart of the server
// all would come in the same moment.
function lost() {
  if (is("outside", "closed")) return;
  const where = navigator.onLine ? "Connection lost." : "You are offline.";
  state(me ? "reconnecting" : "entering", `${where} Reconnecting…`);
  sentLast = null;
  const wait = Math.min(15_000, 500 * 2 ** tries) * (0.5 + Math.random() / 2);
  tries += 1;
  retryAt = Date.now() + wait;
  timer = setTimeout(dial, wait);
}

// A socket can be dead without knowing it, after a sleep or in another network.
function redial() {
  if (is("outside", "closed")) return;
  letGo();
  socket?.close();
  tries = 0;
  lost();
  dial();
}

function closed({ code, reason }) {
  if (!chat.dataset.final.split(" ").includes(String(code))) return lost();
  const stranger = !me || (code === 4401 && !last); // the form, with the reason, is the way on
  if (!stranger) return end(reason, code === 4409); // then the other tab goes on, and this one can again
  store({ me: (me = null) });
  state("outside");
  $("unusable").textContent = reason;
}

function end(reason, resumable = false) {
  letGo();
  state("closed");
  for (const dialog of document.querySelectorAll("dialog[open]")) dialog.close();
  $("why").textContent = reason || "The server has ended the connection.";
  const texts = [...unsent.map((message) => message.text), text.value];
  const draft = texts.filter(Boolean).join("\n"); // to be copied, or sent by whoever enters again
  $("rest").value = draft;
  $("save").focus(); // the box has gone, and the focus with it
  if (!resumable) store({ me: null, unsent: [], draft });
}

setInterval(() => {
  if (socket?.readyState < WebSocket.CLOSED && Date.now() - heard > 1500 * chat.dataset.beat) redial();
}, 5000);
for (const change of ["online", "offline"]) addEventListener(change, redial);
$("retry").addEventListener("click", redial);
document.addEventListener("visibilitychange", () => {
  if (!document.hidden && is("reconnecting")) redial();
});
addEventListener("pagehide", () => is("outside") || send({ bye: true }));
addEventListener("pageshow", (event) => event.persisted && location.reload());

// ── What arrives ──

function arrive({ data }) {
  heard = Date.now();
  htmx.swap({ sourceElement: chat, target: "#log", swap: "beforeend", text: data });
}

// htmx has made elements of a frame, and is about to put them into the page: the moment to read what
// they mean for us, and to take out what has been shown already.
chat.addEventListener("htmx:before:swap", ({ detail }) => {
  for (const { fragment, target } of detail.tasks) {
    if (target === $("unusable")) state("outside");
    // At the server's pace, because the timers of a hidden tab stand still.
    if (target === $("beat") && is("connected")) send({ here: last });
    for (const node of fragment.querySelectorAll("[data-token], [data-verdict], [data-seq]")) {
      if (node.dataset.token) welcome(node.dataset);
      else if (node.dataset.verdict) verdict(node.dataset, node.textContent);
      else entry(node);
    }
  }
  pump(); // only now: the echo of what we would send may have been in there
});

function welcome({ member, token, after }) {
  last = Math.max(last, after); // what was before that is not to come
  store({ me: (me = { member, token }) });
  const entered = is("entering");
  state("connected");
  if (!entered && tries) tell("Connected again.");
  const lostFocus = [document.body, $("retry")].includes(document.activeElement);
  if (entered || (KEYBOARD && lostFocus)) text.focus(); // lost by a reload, or by Try now
  tries = 0;
  showUnsent(); // anew, and so is the patience with which page.js waits for the echo
}

function entry(li) {
  const { seq, from, id } = li.dataset;
  const mine = from && from === me?.member; // a newcomer is welcomed after what was said before
  if (mine) settle(id);
  const gap = li.classList.contains("gap"); // from here on the server counts anew
  // After a restart what is shown can have been posted again, with another number.
  const shown = $("log").querySelector(`[data-from="${from}"][data-id="${id}"]`);
  if (!gap && (seq <= last || shown)) return li.remove();
  last = Number(seq);
  if (mine) li.classList.add("mine");
}

function verdict({ id, verdict }, why) {
  const message = unsent.find((message) => message.id === id);
  if (verdict === "refused" && message) {
    write([message.text, text.value].filter(Boolean).join("\n")); // back into the box, to be changed
    tell(why);
  }
  settle(id);
}

// ── What we write ──

let unsent = stored.unsent || []; // [{id, text}], the oldest first
let sentLast; // id of the one that was sent last over this line: it waits for its echo, or has it

// One message at a time, the next when the echo of this one has come ("stop and wait"): our messages
// keep their order whatever the network or the server's limits do to one of them.
function pump() {
  if (!is("connected") || !unsent.length) return;
  const { id, text } = unsent[0];
  if (id !== sentLast && send({ say: text, id })) sentLast = id;
}

function settle(id) {
  unsent = unsent.filter((message) => message.id !== id);
  showUnsent();
}

function showUnsent() {
  store({ unsent });
  $("unsent").replaceChildren(
    ...unsent.map((message) => {
      const li = $("unsent-entry").content.cloneNode(true);
      li.querySelector(".text").textContent = message.text;
      return li;
    }),
  );
}

// Set what stands in the box, as if it had been typed.
function write(value) {
  text.value = value;
  text.dispatchEvent(new Event("input"));
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!text.value.trim()) return;
  const id = "m" + Math.random().toString(36).slice(2); // unlike our others, that is all
  const said = text.value.normalize("NFC"); // what the counter counts; others need more bytes
  unsent.push({ id, text: said.toWellFormed?.() ?? said }); // half an emoji is no text
  write("");
  showUnsent();
  pump();
});

$("join").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!is("outside")) return; // Enter was pressed twice
  $("unusable").textContent = "";
  state("entering", "Connecting…");
  if (!hello()) dial(); // after an unusable name the line is still open
});

function leave() {
  if (!send({ leave: true })) socket?.close(); // the server will notice that we do not come back
  end("You have left this room.");
}
$("leave").addEventListener("click", leave);

showUnsent();
$("join").querySelector("button").disabled = false; // until now Enter would have been the browser's own
if (me) state("reconnecting", "Connecting…");
else $("name").focus();
addEventListener("DOMContentLoaded", () => {
  if (!window.htmx) end("This page has not been loaded completely.", true);
  else if (is("reconnecting", "entering")) dial();
});
