// The browser's half of the chat. htmx keeps the WebSocket open and puts what arrives into the page;
// this file says who we are, sends what we write until it has been confirmed, and tells the truth
// about the connection. What makes the page pleasant is in page.js; the chat works without it.
"use strict";

const $ = (id) => document.getElementById(id);
const chat = $("chat"), text = $("text");

// One tab is one member: sessionStorage survives a reload and is not shared with other tabs. Where it
// is forbidden or full, all goes on until the next reload.
const store = {
  get(key) {
    try {
      return JSON.parse(sessionStorage.getItem(key + chat.dataset.code));
    } catch {
      return null;
    }
  },
  set(key, value) {
    try {
      sessionStorage.setItem(key + chat.dataset.code, JSON.stringify(value));
    } catch {}
  },
};

// All scripts have come. On a slow line htmx may have looked at the page before hx-ws was there.
const ready = new Promise((resolve) => document.addEventListener("DOMContentLoaded", resolve));
ready.then(() => htmx.process(chat));
let connection; // htmx's own: its socket, and when it tries again
let joined = false; // the server has welcomed us on this connection
let me = store.get("me"); // {member, token}
let last = 0; // seq of the newest entry shown
let unsent = store.get("unsent") || []; // [{id, text}], the oldest first
let inFlight = null; // id of the one that waits for its echo
let heard = Date.now(), spoke = Date.now();
let wanted = ""; // the name that we have asked for
let greeted = false; // hello has been said on this connection
const shown = new Set(); // "member id" of messages shown, for those posted again after a restart

// ── The connection ──

const FINAL = {
  1000: "You have left this room.",
  1009: "A message was too large, so the server has ended the connection.",
  4401: "The server has restarted, and no longer knows this room.", // or us, but not after a reload
  4404: "This room has closed.",
  4409: "You have opened this chat in another tab, and it goes on there.",
};

function state(name, sentence = "") {
  chat.dataset.state = name;
  $("status").textContent = name === "closed" ? "" : sentence;
  if (name !== "closed") return;
  $("why").textContent = sentence;
  $("over").querySelector("button").focus(); // the box has gone, and the focus with it
}

function dial() {
  state(me ? "connecting" : "outside", "Connecting…");
  ready.then(() => chat.dispatchEvent(new Event("dial")));
}

// A socket can be dead without knowing it, after a sleep or in another network. Tell htmx in its
// stead, and htmx connects again, soon. The old socket must then neither open nor close once more.
function redial() {
  if (!connection?.socket || connection.abortController.signal.aborted) return;
  if (chat.dataset.state === "closed") return;
  clearTimeout(connection.timer);
  connection.attempt = 0;
  connection.socket.dispatchEvent(new CloseEvent("close", { code: 1006 }));
  connection.abortController.abort();
  connection.socket.close();
}

function send(frame) {
  if (connection?.socket?.readyState !== WebSocket.OPEN) return false;
  connection.socket.send(JSON.stringify(frame));
  spoke = Date.now();
  return true;
}

function hello() {
  if (greeted || !(me || wanted)) return;
  greeted = send({ hello: me ? { token: me.token, after: last } : { name: wanted } });
}

chat.addEventListener("htmx-ws-before-connection", (event) => {
  if (chat.dataset.state === "closed") event.preventDefault(); // htmx would connect again on 1000
  connection = event.detail.connection;
  heard = Date.now();
});

chat.addEventListener("htmx-ws-after-connection", async () => {
  clearTimeout(connection.timer);
  joined = greeted = false;
  inFlight = null;
  connection.socket.addEventListener("close", ({ code, reason }) => {
    if (chat.dataset.state === "closed" && !FINAL[code] && reason) $("why").textContent = reason;
    if (chat.dataset.state === "outside") $("unusable").textContent ||= reason;
  });
  if (chat.dataset.state === "outside") $("status").textContent = "";
  await connection.receiving; // frames of the old connection first: they move `last`
  if (chat.dataset.state === "closed") connection.socket.close();
  else hello();
});

chat.addEventListener("htmx-ws-before-message-incoming", () => {
  heard = Date.now();
  // The server's heartbeat sets the pace of ours, because timers stand still in a hidden tab.
  if (joined && heard - spoke > 750 * chat.dataset.beat) send({ here: last });
});

chat.addEventListener("htmx-ws-close", (event) => {
  const { code } = event.detail;
  joined = false;
  if (!code || chat.dataset.state === "closed") return;
  if (connection.config.reconnectCodes.includes(code))
    return state(me ? "reconnecting" : "outside", "Connection lost. Reconnecting…");
  if (code === 1008 || code === 1009) takeBack(inFlight); // or it would be sent, and closed on, again
  if (code === 4401 || code === 4404) store.set("me", (me = null));
  if ((code === 4401 && !last) || (code === 1008 && !me)) return state("outside");
  state("closed", FINAL[code] || "The server has ended the connection.");
});

setInterval(() => {
  const alive = connection && connection.socket?.readyState !== WebSocket.CLOSED;
  if (alive && Date.now() - heard > 1500 * chat.dataset.beat) redial();
}, 5000);
addEventListener("online", redial);
document.addEventListener("visibilitychange", () => {
  if (!document.hidden && chat.dataset.state === "reconnecting") redial();
});
addEventListener("pagehide", () => send({ bye: true }));
addEventListener("pageshow", (event) => event.persisted && location.reload());

// ── What arrives ──

function welcome(them) {
  store.set("me", (me = { member: them.member, token: them.token }));
  joined = true;
  const entered = chat.dataset.state === "outside";
  state("connected");
  if (entered) text.focus();
  pump();
}

function entry(li) {
  const { seq, from, id } = li.dataset;
  const name = from + " " + id;
  const mine = from && from === me?.member;
  if (mine) settle(id);
  const gap = li.classList.contains("gap"); // from here on the server counts anew
  if (!gap && (seq <= last || shown.has(name))) return li.remove();
  last = Number(seq);
  if (from) shown.add(name);
  if (shown.size > 5000) shown.delete(shown.values().next().value);
  if (mine) li.classList.add("mine");
}

function verdict({ id, verdict }, why) {
  if (verdict === "confirmed") return settle(id);
  $("status").textContent = why;
  if (verdict === "refused") return takeBack(id);
  setTimeout(() => {
    if (inFlight === id) inFlight = null;
    pump();
  }, 1000);
}

// Put a message that was not wanted back into the box, to be changed.
function takeBack(id) {
  const message = unsent.find((message) => message.id === id);
  if (message) write([message.text, text.value].filter(Boolean).join("\n"));
  settle(id, $("status").textContent);
}

new MutationObserver((records) => {
  const nodes = records.flatMap((record) => [...record.addedNodes]).filter((node) => node.dataset);
  for (const node of nodes) {
    if (node.dataset.token) welcome(node.dataset);
    else if (node.dataset.verdict) verdict(node.dataset, node.textContent);
    else if (node.dataset.seq) entry(node);
  }
}).observe(chat, { childList: true, subtree: true });

// ── What we write ──

// One message at a time, the next when the echo of this one has come ("stop and wait"): our messages
// keep their order whatever the network or the server's limits do to one of them.
function pump() {
  if (!joined || inFlight || !unsent.length) return;
  const { id, text } = unsent[0];
  if (send({ say: text, id })) inFlight = id;
}

function settle(id, status = "") {
  if (chat.dataset.state === "connected") $("status").textContent = status;
  unsent = unsent.filter((message) => message.id !== id);
  if (inFlight === id) inFlight = null;
  showUnsent();
  pump();
}

function showUnsent() {
  store.set("unsent", unsent);
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
  if (!text.value.trim() || chat.dataset.state === "closed") return;
  const id = [...crypto.getRandomValues(new Uint8Array(12))].map((byte) => byte.toString(36)).join("");
  const said = text.value.normalize("NFC"); // what the counter counts; others need more bytes
  unsent.push({ id, text: said.toWellFormed?.() ?? said }); // half an emoji is no text
  write("");
  showUnsent();
  pump();
});
text.addEventListener("input", () => store.set("draft", text.value));
text.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return; // composing: 你好, not a send
  if (event.keyCode === 229) return; // how Safari says the same
  event.preventDefault();
  $("composer").requestSubmit();
});

$("join").addEventListener("submit", (event) => {
  event.preventDefault();
  wanted = $("name").value;
  if ($("unusable").textContent) greeted = false; // that name was refused: here is another
  $("unusable").textContent = "";
  if (connection?.socket?.readyState === WebSocket.OPEN) hello();
  else dial();
});
$("leave").addEventListener("click", () => {
  send({ leave: true }); // if this is lost, the server notices that we do not come back
  clearTimeout(connection?.timer);
  store.set("me", (me = null));
  state("closed", FINAL[1000]);
});

text.value = store.get("draft") || "";
showUnsent();
$("join").querySelector("button").disabled = false; // until now Enter would have been the browser's own
if (me) dial();
else $("name").focus();

// The wire view is for those who ask for it, and so is its script.
$("wire-open").onclick = function load({ currentTarget: button }) {
  const { src } = button.dataset;
  const script = Object.assign(document.createElement("script"), { src });
  script.onerror = () => (button.onclick = load); // to be asked for again
  button.onclick = null;
  document.head.append(script);
};
