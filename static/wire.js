// The wire view: what goes over the WebSocket, as it happens. It looks on by standing in for the
// browser's own WebSocket; from chat.js it takes $, chat, connection, redial and spoke.
"use strict";
{
  const KEPT = 200, CUT = 160; // frames in the list, characters of each
  const TIME = { hour: "2-digit", minute: "2-digit", second: "2-digit", fractionalSecondDigits: 3 };
  const WORDS = { "#me": "welcome", "#people": "presence", "#typing": "typing", "#beat": "heartbeat" };
  const wire = $("wire"), list = $("wire-frames"), scroller = $("wire-scroller");
  const asked = new Map(); // when we sent what will be answered: a message, by its id, or a hello
  const held = []; // [socket, frame], what a frozen page has not sent
  let sent = spoke; // when the last frame really went out
  const on = (id) => $(id).ariaPressed === "true";
  const press = (id, pressed = !on(id)) => ($(id).ariaPressed = pressed);
  const follow = () => on("wire-pause") || (scroller.scrollTop = scroller.scrollHeight);
  const short = (number) => "…" + String(number).slice(-4); // they are long, and begin alike
  const seconds = (until) => Math.max(0, (until - Date.now()) / 1000).toFixed(1) + " s";

  function show(way, what, data = "") {
    const row = $("wire-frame").content.cloneNode(true);
    // On a projector everybody could read the token, and with it be this member.
    const text = data.replace(/(token"?[:=]")[^"]+/g, "$1••••••");
    const size = way === "● line" ? "" : ` ${new TextEncoder().encode(data).length} bytes`;
    const when = new Date().toLocaleTimeString("en-GB", TIME) + size;
    const parts = { way, when, what, start: text.slice(0, CUT), rest: text.slice(CUT) };
    for (const name in parts) row.querySelector("." + name).textContent = parts[name];
    row.firstElementChild.classList.add(way.slice(2));
    list.append(row);
    while (list.childElementCount > KEPT) list.firstElementChild.remove();
    follow();
  }
  function answered(id, way) {
    const trip = `${(performance.now() - asked.get(id)).toFixed(1)} ms from ${way}`;
    return asked.delete(id) ? ($("wire-trip").textContent = trip) : "";
  }
  function incoming({ data }) {
    const page = new DOMParser().parseFromString(data, "text/html");
    const all = (what, words) => [...page.querySelectorAll(what)].map(words);
    const [first, ...rest] = all("li[data-seq]", (li) => short(li.dataset.seq));
    const what = [
      all("hx-partial", (part) => part.getAttribute("hx-target")).map((target) => WORDS[target]),
      first && (rest.length ? `entries ${first} to ${rest.pop()}` : `entry ${first}`),
      all(".gap", () => "a gap"),
      all("[data-verdict]", ({ dataset }) => `verdict on ${short(dataset.id)}: ${dataset.verdict}`),
      all("[data-token]", () => answered("hello", "hello to welcome")),
      all("li[data-id]", (li) => answered(li.dataset.id, "say to echo")),
    ];
    show("↓ in", what.flat().filter(Boolean).join(", "), data);
  }

  const transmit = WebSocket.prototype.send;
  WebSocket.prototype.send = function (data) {
    const { id, ...frame } = JSON.parse(data), [verb] = Object.keys(frame), { after } = frame.hello ?? {};
    const what = verb + (id ? `, id ${short(id)}` : "") + (after ? `, after ${short(after)}` : "");
    if (verb === "bye" || verb === "leave") thaw(); // or the others would wait for us
    if (on("wire-freeze") && verb !== "hello") return held.push([this, data]), show("↑ held", what, data);
    const copies = verb === "say" && on("wire-twice") ? [data, data] : [data];
    if (copies.length > 1) press("wire-twice", false);
    asked.set(id ?? verb, performance.now());
    for (const copy of copies) transmit.call(this, copy), show("↑ out", what, copy);
    sent = Date.now();
  };
  function thaw() {
    press("wire-freeze", false);
    for (const [socket, data] of held.splice(0)) socket.send(data);
  }
  function closed({ code, reason }) {
    for (const row of wire.querySelectorAll("[data-code]")) row.ariaCurrent = row.dataset.code == code;
    const meaning = wire.querySelector("[aria-current=true] td")?.textContent ?? "not a code of this chat";
    show("● line", `closed with ${code}: ${meaning}`, reason);
    held.length = 0; // lost with the connection; chat.js says again what has had no echo
    thaw();
  }
  function watch(socket) {
    show("● line", socket.readyState === WebSocket.CONNECTING ? "connecting" : "open already");
    socket.addEventListener("open", () => show("● line", "open: the server has said 101"));
    socket.addEventListener("message", incoming);
    socket.addEventListener("close", closed, { once: true }); // after a redial it closes once more
    if (on("wire-plug")) socket.close(); // for the page, a try that has failed: 1006
  }
  if (connection?.socket?.readyState <= WebSocket.OPEN) watch(connection.socket);
  window.WebSocket = class extends WebSocket { constructor(...address) { watch(super(...address)); } };

  // htmx keeps only the number of the timer for its next try, so note of each when it is due.
  const start = setTimeout, due = new Map();
  window.setTimeout = (...call) => {
    const timer = start(...call);
    if (chat.dataset.state === "reconnecting") due.set(timer, Date.now() + call[1]);
    return timer;
  };
  setInterval(() => {
    const { state } = chat.dataset, next = due.get(connection?.timer);
    const end = seconds(sent + 1000 * wire.dataset.silence);
    const silent = `open, but silent; the server lets go in about ${end}`;
    const wait = next > Date.now() ? `try ${connection.attempt} in ${seconds(next)}` : "trying";
    const words = { connected: on("wire-freeze") ? silent : "open", reconnecting: `reconnecting, ${wait}` };
    $("wire-state").textContent = words[state] ?? state;
  }, 200);

  $("wire-plug").onclick = () => (press("wire-plug"), redial()); // in again: the next try comes soon
  $("wire-freeze").onclick = () => (on("wire-freeze") ? thaw() : press("wire-freeze"));
  $("wire-twice").onclick = () => press("wire-twice");
  $("wire-pause").onclick = () => press("wire-pause") || follow();
  addEventListener("keydown", (event) => event.key === "Escape" && !event.isComposing && wire.hidePopover());
  wire.ontoggle = ({ newState }) => {
    if (newState === "open") return follow();
    if (on("wire-plug")) $("wire-plug").click(); // or the chat would stay dead, and not say why
    if (!chat.contains(document.activeElement)) $("wire-open").focus(); // it was in the panel
  };
  for (const name of ["host", "origin"]) $("wire-" + name).textContent = location[name];
}
