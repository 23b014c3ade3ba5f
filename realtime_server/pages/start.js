// The start page: one form, one channel at a time, one list. What comes from outside is only ever set as text.

import { Channel, parse } from "./channel.js"
import * as lines from "./lines.js"

const MOST_MESSAGES = 200
const MOST_CHARACTERS = 20_000
const MOST_BYTES = 1024
const COPIED_MS = 1600
const ACTIVE = ["connecting", "joining", "joined", "waiting"]
const HINTS = [
  [/^Unauthorized:/, "The policies on realtime.messages decide who may read a private topic. Paste the token of a user they let in."],
  [/^(\w*JWT\w*|JwtSign\w+):/, "A token that this server accepts: realtime-server token --sub USER_ID"],
  [/^PrivateOnly:/, "Choose Private, and paste a token."],
  [/^Unable to subscribe .* Realtime is enabled/, "Publish the table: alter publication supabase_realtime add table ..."],
  [/^Unable to subscribe .* invalid column/, "Is it the column's name, and may the role (without a token: anon) select it?"],
]

const at = (id) => document.getElementById(id)
const base = new URL(".", document.baseURI).href.replace(/\/$/, "")
const title = document.title

let anonKey = "" // given by the server, or typed in
let channel = null
let joined = null // what the channel was made from: {key, topic, isPrivate, token, schema, table, filter, event}
let state = "left"
let received = 0

// -- the form

const wanted = () => ({
  key: anonKey,
  topic: at("topic").value,
  isPrivate: at("private").checked,
  token: at("token").value.trim(),
  schema: at("schema").value.trim() || at("schema").defaultValue,
  table: at("table").value.trim(),
  filter: at("filter").value.trim(),
  event: at("change-event").value,
})

function isWanted() {
  const now = wanted()
  return joined !== null && Object.keys(now).every((name) => now[name] === joined[name])
}

function join() {
  const { topic, isPrivate, token } = wanted()
  if (!topic.trim() || !anonKey) return
  channel?.leave()
  if (joined?.topic !== topic || joined.isPrivate !== isPrivate) clear()
  joined = wanted()
  history.replaceState(null, "", hash(joined))
  document.title = `${topic} · ${title}`
  const url = `${base.replace(/^http/, "ws")}/realtime/v1/websocket?apikey=${encodeURIComponent(anonKey)}&vsn=2.0.0`
  const changes = lines.changes(joined)
  channel = new Channel({ url, topic, isPrivate, token, changes, onState: show, onMessage: receive })
  channel.connect()
}

function leave() {
  channel?.leave()
  channel = null
  show("left")
  at("topic").focus()
}

/** What was joined, for links: never the token. */
function hash({ topic, isPrivate, schema, table, filter, event }) {
  const named = (name, value) => `${name}=${encodeURIComponent(value).replace(/%(3A|2F|40)/g, decodeURIComponent)}`
  const parts = [named("topic", topic)]
  if (isPrivate) parts.push("private=true")
  if (table) parts.push(named("schema", schema), named("table", table), named("filter", filter), named("event", event))
  return `#${parts.join("&")}`
}

function readHash() {
  const link = new URLSearchParams(location.hash.slice(1))
  if (!link.get("topic")) return false
  at("topic").value = link.get("topic")
  at(link.get("private") === "true" ? "private" : "public").checked = true
  at("schema").value = link.get("schema") || at("schema").defaultValue
  at("table").value = link.get("table") ?? ""
  at("filter").value = link.get("filter") ?? ""
  at("change-event").value = link.get("event") || "*"
  return true
}

function formChanged() {
  if (!at("key-field").hidden) anonKey = at("key").value.trim()
  at("join").disabled = !anonKey
  const facts = { ...wanted(), base, anonKey }
  facts.topic ||= at("topic").defaultValue
  for (const name of ["psql", "curl", "javascript"]) write(at(name), lines[name](facts))
  at("curl-hint").hidden = !facts.isPrivate
  at("javascript-hint").hidden = !lines.needsToken(facts)
  arrangeButtons()
}

/** The long key is shown shortened, by the style sheet: selected or copied, it is whole. */
function write(code, text) {
  const parts = text.split(anonKey || undefined)
  code.replaceChildren(...parts.flatMap((part, i) => (i ? [element("span", "key", anonKey), part] : [part])))
}

function arrangeButtons() {
  const isActive = ACTIVE.includes(state)
  const hadFocus = document.activeElement === at("join")
  at("leave").hidden = !isActive
  at("join").hidden = isActive && isWanted()
  if (hadFocus && at("join").hidden) at("leave").focus()
}

// -- the state

function show(next, reason = "", waitMs = 0) {
  if (next === "waiting" && state === "joined") note(`Connection lost${reason && `: ${reason}`}`)
  state = next
  const words = {
    left: "Not joined",
    connecting: "Connecting",
    joining: "Connected, joining",
    joined: `Joined ${joined?.topic}`,
    waiting: `Connection lost, trying again in ${Math.max(1, Math.round(waitMs / 1000))} s`,
    refused: "Refused by the server",
    closed: "Closed by the server",
  }
  at("state").dataset.state = state
  at("state-text").textContent = words[state]
  explain(reason, state === "refused")
  at("send").disabled = state !== "joined"
  at("send-result").textContent = state === "joined" ? "" : "Join first."
  at("send-result").classList.remove("error")
  at("empty").textContent = ACTIVE.includes(state)
    ? "Nothing yet. Send from here, or run one of the lines in a terminal."
    : "Join a topic, then send to it: messages appear here, the newest on top."
  arrangeButtons()
}

/** A reason, and what to do about it. */
function explain(reason, isRefusal) {
  put(at("state-reason"), reason)
  at("state-reason").classList.toggle("error", isRefusal)
  put(at("state-hint"), HINTS.find(([pattern]) => isRefusal && pattern.test(reason))?.[1] ?? "")
}

function put(place, text) {
  place.textContent = text
  place.hidden = !text
}

// -- the list

function receive({ event, payload }) {
  if (event === "system" && payload.extension === "postgres_changes") hearOfChanges(payload)
  if (event === "postgres_changes") {
    showChange(payload.data)
    return
  }
  if (event !== "broadcast") {
    const item = element("li", "frame")
    item.append(element("span", "event", event), element("code", "", shorten(JSON.stringify(payload))), now())
    add(item)
    return
  }
  const item = element("li", "message")
  const head = element("div", "head")
  head.append(element("span", "event", payload.event))
  if (payload.meta?.replayed) head.append(element("span", "tag", "replayed"))
  if (payload.payload instanceof Uint8Array) head.append(element("span", "tag", `${payload.payload.length} bytes`))
  const id = element("span", "id", payload.meta?.id ?? "")
  id.title = id.textContent && "id of the message"
  head.append(id, now())
  item.append(head, element("pre", "", pretty(payload.payload)))
  at("count").textContent = (++received).toLocaleString("en")
  add(item)
}

function showChange({ schema, table, type, record, old_record, errors }) {
  const item = element("li", "message")
  const head = element("div", "head")
  head.append(element("span", "event", type), element("span", "tag", "row change"), element("span", "id", `${schema}.${table}`), now())
  const shown = Object.entries({ errors, record, old_record }).filter(([, value]) => value)
  item.append(head, element("pre", "", pretty(Object.fromEntries(shown))))
  at("count").textContent = (++received).toLocaleString("en")
  add(item)
}

function hearOfChanges({ status, message }) {
  if (status === "gap") note(`Row changes are missing: ${message}`)
  else if (status === "error") explain(message, true)
  else explain(`Row changes of ${joined.schema}.${joined.table}: ${message}`, false)
}

function note(text) {
  const item = element("li", "note")
  item.append(element("span", "", text), now())
  add(item)
}

function add(item) {
  const list = at("messages")
  list.prepend(item)
  while (list.children.length > MOST_MESSAGES) list.lastChild.remove()
  at("clear").hidden = false
  at("empty").hidden = received > 0
}

function clear() {
  at("messages").replaceChildren()
  received = 0
  at("count").textContent = "0"
  at("clear").hidden = true
  at("empty").hidden = false
}

function pretty(payload) {
  if (!(payload instanceof Uint8Array)) return shorten(JSON.stringify(payload, null, 2) ?? "")
  const rest = payload.length - MOST_BYTES
  const hex = Array.from(payload.subarray(0, MOST_BYTES), (byte) => byte.toString(16).padStart(2, "0")).join(" ")
  return rest > 0 ? `${hex}\n... ${rest} more bytes` : hex
}

function shorten(text) {
  const rest = text.length - MOST_CHARACTERS
  return rest > 0 ? `${text.slice(0, MOST_CHARACTERS)}\n... ${rest} more characters` : text
}

function now() {
  const moment = new Date()
  const two = (number, size = 2) => String(number).padStart(size, "0")
  const clock = [moment.getHours(), moment.getMinutes(), moment.getSeconds()].map((part) => two(part)).join(":")
  const time = element("time", "", `${clock}.${two(moment.getMilliseconds(), 3)}`)
  time.dateTime = moment.toISOString()
  return time
}

function element(name, className, text = "") {
  const made = document.createElement(name)
  made.className = className
  made.textContent = text
  return made
}

// -- sending

async function send() {
  const result = at("send-result")
  const tell = (text, isError) => {
    result.textContent = text
    result.classList.toggle("error", isError)
  }
  let payload
  try {
    payload = parse(at("payload").value)
  } catch (error) {
    tell(`Not JSON: ${error.message}`, true)
    at("payload").focus()
    return
  }
  try {
    await channel.broadcast(at("event").value, payload)
    tell("Sent.", false)
  } catch (error) {
    tell(`Not sent: ${error.message}`, true)
  }
}

// -- copying

async function copy(button) {
  const code = at(button.dataset.copies)
  try {
    await navigator.clipboard.writeText(code.textContent)
  } catch {
    // No clipboard without a secure context: select the text; the old command may still copy it.
    getSelection().selectAllChildren(code)
    if (!document.execCommand("copy")) {
      at("copied").textContent = "The text is selected: copy it with the keyboard."
      return
    }
  }
  button.textContent = at("copied").textContent = "Copied"
  setTimeout(() => (button.textContent = "Copy"), COPIED_MS)
}

// -- all together

at("join-form").addEventListener("input", formChanged)
at("join-form").addEventListener("submit", (event) => {
  event.preventDefault()
  join()
})
at("leave").addEventListener("click", leave)
at("send-form").addEventListener("submit", (event) => {
  event.preventDefault()
  if (state === "joined") send()
})
at("payload").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("send-form").requestSubmit()
})
at("clear").addEventListener("click", clear)
at("protocol").addEventListener("change", ({ target }) => at("messages").classList.toggle("without-frames", !target.checked))
for (const button of document.querySelectorAll(".copy")) button.addEventListener("click", () => copy(button))
addEventListener("online", () => channel?.hurry())
document.addEventListener("visibilitychange", () => document.hidden || channel?.hurry())

const isLinked = readHash()
formChanged()
try {
  anonKey = (await (await fetch(`${base}/start.json`)).json()).anon_key ?? ""
  at("key-field").hidden = Boolean(anonKey)
} catch {
  put(at("state-reason"), "The server does not answer. Reload the page when it runs.")
}
formChanged()
addEventListener("hashchange", () => {
  if (!readHash()) return
  formChanged()
  join()
})
if (isLinked) join()
