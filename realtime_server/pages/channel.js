// One topic over one WebSocket: joins, keeps the socket alive, comes back after a loss.
//
// Protocol version 2.0.0. Text frames are [join_ref, ref, topic, event, payload]; a broadcast may also come as a binary frame of
// kind 4. Refs are numbers of this client; a reply carries the ref of its request, and the join's ref marks what belongs to it.

const HEARTBEAT_MS = 25_000
const ANSWER_LIMIT_MS = 10_000
const FIRST_WAIT_MS = 500
const LONGEST_WAIT_MS = 10_000
const USER_BROADCAST = 4
// Refusals that say nothing about this join: the same one may succeed a moment later.
const PASSING = /^(RealtimeRestarting|UnableToConnectToProject|InitializingProjectConnection|DatabaseLackOfConnections):/

/** The server said no; the message is its reason. */
export class Refusal extends Error {}

/**
 * `onState(state, reason, waitMs)` tells of: connecting, joining, joined, waiting (lost, tries again after waitMs), refused, closed
 * (by the server, for good). `onMessage` gets {event, payload} of every frame on the topic; of a broadcast the payload is
 * {event, payload, meta}, where the inner payload is a Uint8Array if it was sent as bytes. `changes` are bindings of postgres_changes.
 */
export class Channel {
  #url
  #topic
  #join
  #onState
  #onMessage
  #socket = null
  #joinRef = null
  #lastRef = 0
  #requests = new Map()
  #failures = 0
  #lastError = ""
  #retry
  #limit
  #heartbeat

  constructor({ url, topic, isPrivate, token, changes, onState, onMessage }) {
    this.#url = url
    this.#topic = `realtime:${topic}`
    this.#join = { config: { private: isPrivate, broadcast: { ack: true, self: true }, postgres_changes: changes } }
    if (token) this.#join.access_token = token
    this.#onState = onState
    this.#onMessage = onMessage
  }

  connect() {
    clearTimeout(this.#retry)
    this.#retry = undefined
    this.#onState("connecting")
    const socket = new WebSocket(this.#url)
    socket.binaryType = "arraybuffer"
    socket.onopen = () => this.#opened(socket)
    socket.onmessage = ({ data }) => this.#receive(decode(data))
    socket.onclose = ({ code, reason }) => this.#lose(socket, reason || (code === 1006 ? "" : `code ${code}`))
    this.#socket = socket
    this.#limit = setTimeout(() => this.#lose(socket, "no answer"), ANSWER_LIMIT_MS)
  }

  /** Do not wait for the next attempt. */
  hurry() {
    if (this.#retry !== undefined) this.connect()
  }

  leave() {
    if (this.#socket?.readyState === WebSocket.OPEN) this.#push(this.#topic, "phx_leave", {})
    this.#end()
  }

  /** Resolves when the server has taken the broadcast. Throws: Refusal, or Error when the connection is lost. */
  async broadcast(event, payload) {
    if (this.#socket?.readyState !== WebSocket.OPEN) throw new Error("not connected")
    await this.#request(this.#topic, "broadcast", { type: "broadcast", event, payload })
  }

  async #opened(socket) {
    clearTimeout(this.#limit)
    this.#heartbeat = setInterval(() => this.#beat(socket), HEARTBEAT_MS)
    this.#onState("joining")
    try {
      await this.#request(this.#topic, "phx_join", this.#join)
    } catch (error) {
      if (!(error instanceof Refusal) || PASSING.test(error.message)) {
        this.#lose(socket, error.message)
      } else if (socket === this.#socket) {
        this.#end()
        this.#onState("refused", error.message)
      }
      return
    }
    this.#failures = 0
    this.#lastError = ""
    this.#onState("joined")
  }

  #beat(socket) {
    this.#request("phoenix", "heartbeat", {}).catch((error) => this.#lose(socket, error.message))
  }

  #receive({ joinRef, ref, topic, event, payload }) {
    if (event === "phx_reply") this.#settle(ref, payload)
    if (topic !== this.#topic || (joinRef !== null && joinRef !== this.#joinRef)) return
    this.#onMessage({ event, payload })
    if (event === "system" && payload.status === "error") this.#lastError = payload.message
    if (event === "phx_error") this.#lose(this.#socket, "the channel crashed")
    if (event === "phx_close") {
      this.#end()
      this.#onState("closed", this.#lastError)
    }
  }

  #settle(ref, { status, response }) {
    const request = this.#requests.get(ref)
    if (request === undefined) return
    this.#requests.delete(ref)
    clearTimeout(request.limit)
    if (status === "ok") request.resolve(response)
    else request.reject(new Refusal(response?.reason ?? JSON.stringify(response)))
  }

  #request(topic, event, payload) {
    return new Promise((resolve, reject) => {
      const ref = this.#push(topic, event, payload)
      const limit = setTimeout(() => {
        this.#requests.delete(ref)
        reject(new Error("no answer"))
      }, ANSWER_LIMIT_MS)
      this.#requests.set(ref, { resolve, reject, limit })
    })
  }

  #push(topic, event, payload) {
    const ref = String(++this.#lastRef)
    if (event === "phx_join") this.#joinRef = ref
    this.#socket.send(JSON.stringify([topic === this.#topic ? this.#joinRef : null, ref, topic, event, payload]))
    return ref
  }

  #lose(socket, reason) {
    if (socket !== this.#socket) return
    this.#end()
    const longest = Math.min(LONGEST_WAIT_MS, FIRST_WAIT_MS * 2 ** this.#failures++)
    // Pages that lost the same server must not all come back at the same moment.
    const wait = longest * (0.5 + Math.random() / 2)
    this.#retry = setTimeout(() => this.connect(), wait)
    this.#onState("waiting", reason, wait)
  }

  /** Forget the socket at once: closing one whose peer is gone takes long, and says nothing new. */
  #end() {
    clearTimeout(this.#retry)
    clearTimeout(this.#limit)
    clearInterval(this.#heartbeat)
    this.#retry = undefined
    const socket = this.#socket
    this.#socket = null
    if (socket === null) return
    socket.onopen = socket.onmessage = socket.onclose = null
    socket.close(1000)
    for (const request of this.#requests.values()) {
      clearTimeout(request.limit)
      request.reject(new Error("connection lost"))
    }
    this.#requests.clear()
  }
}

function decode(data) {
  if (data instanceof ArrayBuffer) return decodeBroadcast(new Uint8Array(data))
  const [joinRef, ref, topic, event, payload] = parse(data)
  return { joinRef, ref, topic, event, payload }
}

/** Kind 4: five bytes (kind, sizes of topic, event and meta, encoding), then topic, event, meta, payload to the end. */
function decodeBroadcast(frame) {
  const [kind, topicSize, eventSize, metaSize, isJson] = frame
  if (kind !== USER_BROADCAST) throw new Error(`a frame of kind ${kind} is none of a server's`)
  let at = 5
  const take = (size) => frame.subarray(at, (at += size))
  const text = (bytes) => new TextDecoder().decode(bytes)
  const topic = text(take(topicSize))
  const event = text(take(eventSize))
  const meta = metaSize ? parse(text(take(metaSize))) : undefined
  const bytes = take(frame.length - at)
  const payload = { event, payload: isJson ? parse(text(bytes)) : bytes, meta }
  return { joinRef: null, ref: null, topic, event: "broadcast", payload }
}

/** JSON whose numbers keep their digits where JavaScript's would not: a bigint of PostgreSQL, a numeric with trailing zeros. */
export function parse(text) {
  return JSON.parse(text, (key, value, context) =>
    typeof value === "number" && JSON.rawJSON && String(value) !== context.source ? JSON.rawJSON(context.source) : value,
  )
}
