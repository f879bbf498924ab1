// The wire view: what goes over the WebSocket, as it happens. chat.js tells it of each new socket
// with a "dial"; from there it takes $, chat, socket, redial, tries and retryAt, too.
"use strict";
{
  const KEPT = 200; // frames in the list
  const CLOCK = { hour: "2-digit", minute: "2-digit", second: "2-digit", fractionalSecondDigits: 3 };
  const KINDS = { "#me": "welcome", "#people": "presence", "#typing": "typing", "#beat": "heartbeat" };
  const wire = $("wire"), list = $("wire-frames"), scroller = $("wire-scroller");
  const time = new Intl.DateTimeFormat("en-GB", CLOCK);
  const asked = new Map(); // when we sent what will be answered: a message, by its id, or a hello
  let held = []; // what a frozen page has not sent
  let sent = Date.now(); // when the last frame really went out, at the latest
  const on = (id) => $(id).getAttribute("aria-pressed") === "true";
  const press = (id, pressed = !on(id)) => $(id).setAttribute("aria-pressed", pressed);
  const follow = () => on("wire-pause") || (scroller.scrollTop = scroller.scrollHeight);
  const short = (number) => "…" + String(number).slice(-4); // they are long, and begin alike
  const seconds = (until) => Math.max(0, (until - Date.now()) / 1000).toFixed(1) + " s";
  const encode = (text) => new TextEncoder().encode(text);
  const commas = (parts) => parts.filter(Boolean).join(", ");
  const hex = (bytes) => [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join(" ");
  const bits = (number, count) => number.toString(2).padStart(count, "0");

  // The frame as it is on the line (RFC 6455, section 5.2). No browser shows a script these bytes,
  // but they follow from the text: the server agrees to no extension that would change them.
  function onTheLine(opcode, mask, payload) {
    const count = payload.length;
    const more = count < 126 ? 0 : count < 65_536 ? 2 : 8; // bytes that a longer length needs
    const length = { 0: count, 2: 126, 8: 127 }[more];
    const digits = count.toString(16).padStart(2 * more, "0");
    const clear = hex(payload.slice(0, 7)) + (count > 7 ? " …" : "");
    return {
      size: `${count} bytes`, mask, clear, number: length, opcode: bits(opcode, 4), length: bits(length, 7),
      first: hex([0x80 + opcode]), second: hex([0x80 * mask + length]),
      long: more ? digits.match(/../g).join(" ") : "",
      key: mask ? "?? ?? ?? ??" : "", payload: mask ? "…" : clear,
    };
  }
  function show(way, what, kinds = "", frame = {}) {
    const row = $("wire-frame").content.firstElementChild.cloneNode(true);
    const parts = { way, what, when: time.format(), ...frame };
    // On a projector everybody could read the token or the key, and with it be this member.
    parts.data = parts.data?.replace(/((token|key)"?[:=]")[^"]+/g, "$1••••••");
    for (const name in parts)
      for (const slot of row.querySelectorAll("." + name)) slot.textContent = parts[name];
    row.className = `${way.slice(2)} ${kinds}`; // by which chat.css leaves out what is not wanted
    list.append(row);
    while (list.childElementCount > KEPT) list.firstElementChild.remove();
    follow();
  }
  function answered(id, way) {
    const took = performance.now() - asked.get(id); // NaN, if it was not ours
    return asked.delete(id) ? ($("wire-trip").textContent = `${took.toFixed(1)} ms from ${way}`) : "";
  }
  function incoming({ data }) {
    const page = new DOMParser().parseFromString(data, "text/html");
    const all = (what, words) => [...page.querySelectorAll(what)].map(words);
    const [first, ...rest] = all("li[data-seq]", (li) => short(li.dataset.seq));
    const kinds = all("hx-partial", (part) => KINDS[part.getAttribute("hx-target")]);
    const what = [
      ...kinds,
      first && (rest.length ? `entries ${first} to ${rest.pop()}` : `entry ${first}`),
      ...all(".gap", () => "a gap"),
      ...all("[hx-target='#unusable']", () => "that name cannot be used"),
      ...all("[data-verdict]", ({ dataset }) => `verdict on ${short(dataset.id)}: ${dataset.verdict}`),
      ...all("[data-token]", () => answered("hello", "hello to welcome")),
      ...all("li[data-id]", (li) => answered(li.dataset.id, "say to echo")),
    ];
    const words = all("li[data-seq], hx-partial", (part) => {
      const names = [...part.querySelectorAll("bdi")].map((name) => name.textContent);
      const text = part.querySelector(".text");
      if (text) return `${names[0]}: ${text.textContent}`;
      return part.dataset.seq ? part.textContent : names.join(", ");
    });
    const line = onTheLine(1, 0, encode(data));
    const frame = { words: words.filter(Boolean).join("\n"), data, ...line };
    show("↓ in", commas(what), [...kinds, first && "entry"].join(" "), frame);
  }
  function outgoing(socket, data) {
    if (socket.readyState !== WebSocket.OPEN) return; // thawed too late
    const { id, ...rest } = JSON.parse(data), { hello, here, say } = rest;
    const [verb] = Object.keys(rest), seq = here ?? hello?.after;
    const what = commas([verb, id && `id ${short(id)}`, seq && `after ${short(seq)}`]);
    const line = onTheLine(1, 1, encode(data));
    const row = [what, here ? "heartbeat" : verb, { words: say ?? hello?.name, data, ...line }];
    if (verb === "bye" || verb === "leave") thaw(); // or the others would wait for us
    if (on("wire-freeze") && verb !== "hello") {
      held.push(data);
      return show("↑ held", ...row);
    }
    asked.set(id ?? verb, performance.now());
    sent = Date.now();
    WebSocket.prototype.send.call(socket, data);
    show("↑ out", ...row);
    if (verb !== "say" || !on("wire-twice")) return;
    press("wire-twice", false);
    setTimeout(() => socket.send(data), 500); // with the echo on its way, it would have no answer
  }
  function thaw() {
    press("wire-freeze", false);
    for (const data of held.splice(0)) socket.send(data);
  }
  function closed({ target, code, reason, wasClean }) {
    if (target !== socket) return show("● line", "the old connection is closed, too");
    for (const row of wire.querySelectorAll("[data-code]"))
      row.setAttribute("aria-current", Number(row.dataset.code) === code);
    const meaning = wire.querySelector("[aria-current=true] td")?.textContent ?? "not a code of this chat";
    const payload = [code >> 8, code & 255, ...encode(reason)]; // the code is its first two bytes
    const line = wasClean ? onTheLine(8, 0, payload) : {};
    show("● line", `closed with ${code}: ${meaning}`, "", { words: reason, ...line });
  }
  function watch(socket) {
    held = []; // lost with the old connection; chat.js says again what has had no echo
    press("wire-freeze", false);
    socket.send = (data) => outgoing(socket, data); // of this one only: the browser's own is as it was
    socket.addEventListener("open", () => show("● line", "open: the server has said 101"));
    socket.addEventListener("message", incoming);
    socket.addEventListener("close", closed);
    if (socket.readyState === WebSocket.OPEN) return show("● line", "open already");
    show("● line", "connecting");
    if (on("wire-plug")) socket.close(); // for the page, a try that has failed: 1006
  }
  chat.addEventListener("dial", ({ detail }) => watch(detail));
  if (socket?.readyState <= WebSocket.OPEN) watch(socket);

  setInterval(() => {
    const { state } = chat.dataset;
    const left = seconds(sent + 1000 * wire.dataset.silence);
    const silent = `open, but silent; the server lets go within ${left}`;
    const wait = retryAt > Date.now() ? `try ${tries} in ${seconds(retryAt)}` : "trying";
    const words = { connected: on("wire-freeze") ? silent : "open", reconnecting: `reconnecting, ${wait}` };
    $("wire-state").textContent = words[state] ?? state;
  }, 200);

  $("wire-plug").onclick = () => (press("wire-plug"), redial()); // in again: the next try comes soon
  $("wire-freeze").onclick = () => (on("wire-freeze") ? thaw() : press("wire-freeze"));
  $("wire-twice").onclick = () => press("wire-twice");
  $("wire-pause").onclick = () => press("wire-pause") || follow();
  const reading = ({ target }) => target.open && press("wire-pause", true); // or it would move away
  list.addEventListener("toggle", reading, true);
  addEventListener("keydown", ({ key, isComposing }) => {
    const open = document.querySelector("dialog[open]"); // which it closes
    if (key === "Escape" && !isComposing && !open) wire.hidePopover();
  });
  wire.ontoggle = ({ newState }) => {
    if (newState === "open") return follow();
    if (on("wire-plug")) $("wire-plug").click(); // or the chat would stay dead, and not say why
    if (!chat.contains(document.activeElement)) $("wire-open").focus(); // it was in the panel
  };
  for (const name of ["host", "origin"]) $("wire-" + name).textContent = location[name];
}
