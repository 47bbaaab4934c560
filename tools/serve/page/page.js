// The page of the speech server: a voice, a text, sound while it is spoken. No resource but this server's.
// Sound comes as PCM and is played piece by piece; the chosen container is asked for again only when it is downloaded,
// with the same seed and voice, so what is downloaded is what was heard.
"use strict";

const LABELS = {
  en: {
    title: "Speech", skip: "To the text", voice: "Voice", chooseVoice: "Voice", delete: "Delete", newVoice: "Add a voice",
    file: "Recording of the voice, 3 to 15 seconds", record: "Record", stopRecording: "Stop recording",
    refText: "What is said in it, exactly", name: "Name of the voice", consent: "The person who is heard agrees to be cloned",
    store: "Store the voice", text: "Text", whatToSay: "What to say", format: "Download as", seed: "Seed (empty: another each time)",
    say: "Speak", stop: "Stop", sound: "Sound", download: "Download", takes: "Earlier takes", keyHeading: "Access",
    key: "API key, if this server asks for one; it stays in this page", ready: "Ready", loading: "The model is loading",
    unreachable: "The server does not answer", noVoice: "No voice yet: add one", stored: "The voice is stored", deleted: "The voice is deleted",
    speaking: "Speaking", done: "Done", stopped: "Stopped", noRecording: "Choose a recording or make one",
    noText: "Write what is to be said", noConsent: "The person who is heard must agree", noMicrophone: "No microphone can be used here",
    confirmDelete: "Delete this voice?", firstSound: "First sound", whole: "Everything", length: "Length", usedSeed: "Seed",
    seconds: "s", wave: "Waveform", mel: "Mel spectrogram", replay: "Play", recording: "Recording",
    nothing: "Nothing has been spoken yet", noSound: "Nothing was recorded; try again", sample: "The recording of the voice", player: "The speech",
  },
  ar: {
    title: "تحويل النص إلى كلام", skip: "إلى النص", voice: "الصوت", chooseVoice: "الصوت", delete: "حذف", newVoice: "إضافة صوت",
    file: "تسجيل للصوت، من ٣ إلى ١٥ ثانية", record: "تسجيل", stopRecording: "إيقاف التسجيل",
    refText: "ما يقال في التسجيل، حرفيا", name: "اسم الصوت", consent: "صاحب الصوت موافق على استنساخ صوته",
    store: "حفظ الصوت", text: "النص", whatToSay: "النص المطلوب نطقه", format: "صيغة التنزيل", seed: "البذرة (فارغة: جديدة كل مرة)",
    say: "انطق", stop: "إيقاف", sound: "الكلام", download: "تنزيل", takes: "المحاولات السابقة", keyHeading: "الوصول",
    key: "مفتاح الواجهة إن طلبه الخادم، ويبقى في هذه الصفحة", ready: "جاهز", loading: "يجري تحميل النموذج",
    unreachable: "الخادم لا يجيب", noVoice: "لا يوجد صوت بعد: أضف صوتا", stored: "حفظ الصوت", deleted: "حذف الصوت",
    speaking: "يجري النطق", done: "انتهى", stopped: "أوقف", noRecording: "اختر تسجيلا أو سجل واحدا",
    noText: "اكتب النص المطلوب نطقه", noConsent: "لا بد من موافقة صاحب الصوت", noMicrophone: "لا يمكن استخدام ميكروفون هنا",
    confirmDelete: "هل تريد حذف هذا الصوت؟", firstSound: "أول صوت", whole: "المدة الكاملة", length: "طول الكلام", usedSeed: "البذرة",
    seconds: "ث", wave: "شكل الموجة", mel: "طيف ميل", replay: "تشغيل", recording: "تسجيل جار",
    nothing: "لم ينطق شيء بعد", noSound: "لم يسجل شيء، حاول مرة أخرى", sample: "تسجيل الصوت", player: "الكلام المنطوق",
  },
};
const RATE = 24000;
const MAX_TAKES = 20;
const $ = (id) => document.getElementById(id);

let language = "en";
let stateName = "loading";
let recorder = null;
let recorded = null; // a Blob of wav
let abort = null;
let playing = null; // the AudioContext of a stream
let shown = new Float32Array(0);
const takes = [];

const label = (name) => LABELS[language][name];

function setLanguage(next) {
  language = next;
  document.documentElement.lang = next;
  document.documentElement.dir = next === "ar" ? "rtl" : "ltr";
  document.title = label("title");
  for (const node of document.querySelectorAll("[data-label]")) node.textContent = label(node.dataset.label);
  if (recorder) $("record").textContent = label("stopRecording");
  $("language").textContent = next === "ar" ? "English" : "العربية";
  $("language").lang = next === "ar" ? "en" : "ar";
  for (const name of ["wave", "mel", "sample", "player"]) $(name).setAttribute("aria-label", label(name));
  if ($("voice").disabled) $("voice").replaceChildren(new Option(label("noVoice"), ""));
  try { localStorage.setItem("language", next); } catch { /* private windows have none */ }
  showState(stateName);
  showTakes();
}

function showState(name) {
  stateName = name;
  $("state").textContent = label(name);
}

function fail(text, place = "message") { // beside what was pressed; read out, because both places are alerts
  $("message").textContent = $("upload-message").textContent = "";
  $(place).textContent = text;
}

function headers(more = {}) {
  const key = $("key").value.trim();
  return key ? { ...more, Authorization: `Bearer ${key}` } : more;
}

async function request(address, options = {}) {
  const answer = await fetch(address, { ...options, headers: headers(options.headers) });
  if (answer.ok) return answer;
  let text = `${answer.status}`;
  try { text = (await answer.json()).error.message; } catch { /* not ours */ }
  if (answer.status === 401) $("key").focus();
  throw new Error(text);
}

async function loadVoices(chosen) {
  const { voices } = await (await request("/v1/audio/voices")).json();
  const select = $("voice");
  const before = chosen || select.value;
  select.replaceChildren(...voices.map(({ id, name }) => new Option(name, id, false, id === before)));
  $("voice").disabled = $("delete").disabled = $("say").disabled = voices.length === 0;
  if (voices.length === 0) {
    select.append(new Option(label("noVoice"), ""));
    $("new-voice").open = true;
  }
  return voices.length;
}

async function watch() {
  try {
    const answer = await fetch("/health");
    const count = await loadVoices();
    if (!abort) showState(answer.ok ? (count ? "ready" : "noVoice") : "loading");
    if (answer.ok) return;
  } catch { showState("unreachable"); }
  setTimeout(watch, 2000);
}

// --- a recording, written as wav here: what browsers record (webm) is not decoded by every server

async function toggleRecording() {
  if (recorder) { recorder.stop(); return; }
  let stream;
  try { stream = await navigator.mediaDevices.getUserMedia({ audio: true }); } catch { fail(label("noMicrophone"), "upload-message"); return; }
  fail("");
  const pieces = [];
  recorder = new MediaRecorder(stream);
  recorder.ondataavailable = (event) => pieces.push(event.data);
  recorder.onstop = async () => {
    for (const track of stream.getTracks()) track.stop();
    recorder = null;
    $("record").setAttribute("aria-pressed", "false");
    $("record").textContent = label("record");
    let sound;
    try { sound = await new OfflineAudioContext(1, 1, RATE).decodeAudioData(await new Blob(pieces).arrayBuffer()); }
    catch { fail(label("noSound"), "upload-message"); return; } // stopped before anything came
    recorded = new Blob([wavOf(sound.getChannelData(0))], { type: "audio/wav" });
    $("file").value = "";
    showSample(recorded);
  };
  recorder.start();
  $("record").setAttribute("aria-pressed", "true");
  $("record").textContent = label("stopRecording");
}

function wavOf(wave) {
  const view = new DataView(new ArrayBuffer(44 + 2 * wave.length));
  const word = (at, text) => [...text].forEach((letter, i) => view.setUint8(at + i, letter.charCodeAt(0)));
  word(0, "RIFF"); view.setUint32(4, 36 + 2 * wave.length, true); word(8, "WAVEfmt "); view.setUint32(16, 16, true);
  view.setUint16(20, 1, true); view.setUint16(22, 1, true); view.setUint32(24, RATE, true); view.setUint32(28, 2 * RATE, true);
  view.setUint16(32, 2, true); view.setUint16(34, 16, true); word(36, "data"); view.setUint32(40, 2 * wave.length, true);
  wave.forEach((value, i) => view.setInt16(44 + 2 * i, Math.round(32767 * Math.max(-1, Math.min(1, value))), true));
  return view.buffer;
}

function showSample(blob) {
  if ($("sample").src) URL.revokeObjectURL($("sample").src);
  $("sample").src = URL.createObjectURL(blob);
  $("sample").hidden = false;
}

async function upload(event) {
  event.preventDefault();
  const sample = $("file").files[0] || recorded;
  if (!sample) { fail(label("noRecording"), "upload-message"); $("file").focus(); return; }
  if (!$("consent").checked) { fail(label("noConsent"), "upload-message"); $("consent").focus(); return; }
  const form = new FormData();
  form.append("audio_sample", sample, "sample");
  form.append("name", $("name").value);
  form.append("consent", "given on the page");
  form.append("ref_text", $("ref-text").value);
  try {
    const { voice } = await (await request("/v1/audio/voices", { method: "POST", body: form })).json();
    await loadVoices(voice.id);
    $("upload").reset();
    $("sample").hidden = true;
    recorded = null;
    fail("");
    showState("stored");
    $("new-voice").open = false;
    $("text").focus();
  } catch (error) { fail(error.message, "upload-message"); }
}

async function removeVoice() {
  if (!$("voice").value || !confirm(label("confirmDelete"))) return;
  try {
    await request(`/v1/audio/voices/${encodeURIComponent($("voice").value)}`, { method: "DELETE" });
    fail("");
    showState("deleted");
    await loadVoices();
  } catch (error) { fail(error.message); }
}

// --- speech

async function speak(event) {
  event.preventDefault();
  const text = $("text").value.trim();
  if (!text) { fail(label("noText")); $("text").focus(); return; }
  stopSound();
  fail("");
  const mine = new AbortController();
  abort = mine;
  $("stop").disabled = false;
  showState("speaking");
  const seed = /^[0-9]+$/.test($("seed").value) ? Number($("seed").value) : undefined;
  const asked = { model: "tts-1", input: text, voice: $("voice").value, response_format: "pcm", stream_format: "audio", seed };
  const began = performance.now();
  const player = new Player();
  let first = null;
  try {
    const answer = await request("/v1/audio/speech", {
      method: "POST", body: JSON.stringify(asked), headers: { "Content-Type": "application/json" }, signal: mine.signal,
    });
    const used = answer.headers.get("X-Seed");
    const reader = answer.body.getReader();
    let rest = new Uint8Array(0);
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      first ??= (performance.now() - began) / 1000;
      const bytes = new Uint8Array(rest.length + value.length);
      bytes.set(rest); bytes.set(value, rest.length);
      const whole = bytes.length - (bytes.length % 2);
      rest = bytes.slice(whole);
      player.feed(floats(bytes.subarray(0, whole)));
      draw(player.wave());
    }
    const wave = player.wave();
    addTake({ text, asked, seed: used, wave, first, all: (performance.now() - began) / 1000, voice: $("voice").selectedOptions[0].text });
    showState("done");
  } catch (error) {
    if (error.name === "AbortError") showState("stopped");
    else { fail(error.message); showState("ready"); }
  } finally {
    if (abort === mine) { abort = null; $("stop").disabled = true; }
  }
}

function floats(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  return Float32Array.from({ length: bytes.length / 2 }, (_, i) => view.getInt16(2 * i, true) / 32768);
}

class Player {
  constructor() {
    this.context = new AudioContext({ sampleRate: RATE });
    playing = this.context;
    this.at = 0;
    this.pieces = [];
  }
  feed(samples) {
    if (!samples.length) return;
    this.pieces.push(samples);
    if (this.context.state === "closed") return;
    const buffer = this.context.createBuffer(1, samples.length, RATE);
    buffer.copyToChannel(samples, 0);
    const source = this.context.createBufferSource();
    source.buffer = buffer;
    source.connect(this.context.destination);
    this.at = Math.max(this.at, this.context.currentTime + 0.05);
    source.start(this.at);
    this.at += buffer.duration;
  }
  wave() {
    const wave = new Float32Array(this.pieces.reduce((sum, piece) => sum + piece.length, 0));
    let at = 0;
    for (const piece of this.pieces) { wave.set(piece, at); at += piece.length; }
    return wave;
  }
}

function stopSound() {
  if (abort) abort.abort();
  if (playing && playing.state !== "closed") playing.close();
  playing = null;
}

function addTake(take) {
  take.blob = new Blob([wavOf(take.wave)], { type: "audio/wav" });
  takes.unshift(take);
  takes.length = Math.min(takes.length, MAX_TAKES);
  show(take);
  showTakes();
}

function show(take) {
  if ($("player").src) URL.revokeObjectURL($("player").src);
  $("player").src = URL.createObjectURL(take.blob);
  const facts = [["firstSound", seconds(take.first)], ["whole", seconds(take.all)], ["length", seconds(take.wave.length / RATE)], ["usedSeed", take.seed]];
  $("timing").replaceChildren(...facts.map(([name, value]) => {
    const row = document.createElement("div");
    const term = document.createElement("dt");
    const fact = document.createElement("dd");
    term.textContent = label(name);
    fact.textContent = value;
    row.append(term, fact);
    return row;
  }));
  $("download").hidden = false;
  $("download").href = $("player").src;
  $("download").download = "speech.wav";
  $("download").onclick = (event) => { if ($("format").value !== "wav") { event.preventDefault(); download(take, $("format").value); } };
  draw(take.wave);
}

async function download(take, format) {
  try {
    const body = JSON.stringify({ ...take.asked, seed: Number(take.seed), response_format: format, stream_format: undefined });
    const answer = await request("/v1/audio/speech", { method: "POST", body, headers: { "Content-Type": "application/json" } });
    const link = document.createElement("a");
    link.href = URL.createObjectURL(await answer.blob());
    link.download = `speech.${format}`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  } catch (error) { fail(error.message); }
}

const seconds = (value) => `${value.toFixed(2)} ${label("seconds")}`;

function showTakes() {
  $("takes").replaceChildren(...takes.map((take) => {
    const item = document.createElement("li");
    const text = document.createElement("bdi");
    const again = document.createElement("button");
    text.textContent = `${take.voice}: ${take.text}`;
    text.dir = "auto";
    again.type = "button";
    again.className = "quiet";
    again.textContent = `${label("replay")} (${seconds(take.wave.length / RATE)})`;
    again.setAttribute("aria-label", `${again.textContent}: ${text.textContent}`);
    again.onclick = () => { stopSound(); show(take); $("player").play(); };
    item.append(text, again);
    return item;
  }));
  if (takes.length) show(takes[0]);
}

// --- pictures

function draw(wave) {
  shown = wave;
  $("spoken").hidden = !wave.length;
  $("nothing").hidden = wave.length > 0;
  const style = getComputedStyle(document.documentElement);
  drawWave($("wave"), wave, style.getPropertyValue("--accent"));
  drawMel($("mel"), wave);
}

function drawWave(canvas, wave, color) {
  const context = canvas.getContext("2d");
  const { width, height } = canvas;
  context.clearRect(0, 0, width, height);
  context.fillStyle = color;
  for (let x = 0; x < width && wave.length; x++) {
    const begin = Math.floor((x * wave.length) / width);
    const end = Math.max(begin + 1, Math.floor(((x + 1) * wave.length) / width));
    let low = 0, high = 0;
    for (let i = begin; i < end; i++) { low = Math.min(low, wave[i]); high = Math.max(high, wave[i]); }
    context.fillRect(x, (height / 2) * (1 - high), 1, Math.max(1, (height / 2) * (high - low)));
  }
}

const SIZE = 512;
const BANDS = 80;
const WINDOW = Float32Array.from({ length: SIZE }, (_, i) => 0.5 - 0.5 * Math.cos((2 * Math.PI * i) / SIZE));
const mel = (hz) => 2595 * Math.log10(1 + hz / 700);
const EDGES = Array.from({ length: BANDS + 1 }, (_, i) => {
  const hz = 700 * (10 ** ((i * mel(RATE / 2)) / BANDS / 2595) - 1);
  return Math.min(SIZE / 2, Math.round((hz * SIZE) / RATE));
});

function drawMel(canvas, wave) {
  const context = canvas.getContext("2d");
  const { width, height } = canvas;
  const columns = Math.min(width, Math.max(1, Math.floor(wave.length / 240)));
  const picture = new ImageData(columns, BANDS);
  const real = new Float32Array(SIZE), imaginary = new Float32Array(SIZE);
  for (let x = 0; x < columns && wave.length >= SIZE; x++) {
    const begin = Math.floor((x * (wave.length - SIZE)) / columns);
    for (let i = 0; i < SIZE; i++) { real[i] = wave[begin + i] * WINDOW[i]; imaginary[i] = 0; }
    transform(real, imaginary);
    for (let band = 0; band < BANDS; band++) {
      let power = 0;
      const end = Math.max(EDGES[band] + 1, EDGES[band + 1]);
      for (let k = EDGES[band]; k < end; k++) power += real[k] ** 2 + imaginary[k] ** 2;
      const share = Math.max(0, Math.min(1, (Math.log10(power / (end - EDGES[band]) + 1e-8) + 5) / 7));
      const at = 4 * ((BANDS - 1 - band) * columns + x);
      picture.data.set([255 * share ** 1.5, 210 * share, 120 + 60 * share - 120 * share ** 3, 255], at);
    }
  }
  const small = new OffscreenCanvas(columns, BANDS);
  small.getContext("2d").putImageData(picture, 0, 0);
  context.clearRect(0, 0, width, height);
  context.drawImage(small, 0, 0, width, height);
}

function transform(real, imaginary) { // radix 2, in place
  const n = real.length;
  for (let i = 1, j = 0; i < n; i++) {
    let bit = n >> 1;
    for (; j & bit; bit >>= 1) j ^= bit;
    j ^= bit;
    if (i < j) { [real[i], real[j]] = [real[j], real[i]]; [imaginary[i], imaginary[j]] = [imaginary[j], imaginary[i]]; }
  }
  for (let length = 2; length <= n; length <<= 1) {
    for (let k = 0; k < length / 2; k++) {
      const angle = (-2 * Math.PI * k) / length, c = Math.cos(angle), s = Math.sin(angle);
      for (let i = k; i < n; i += length) {
        const j = i + length / 2;
        const r = real[j] * c - imaginary[j] * s, m = real[j] * s + imaginary[j] * c;
        real[j] = real[i] - r; imaginary[j] = imaginary[i] - m;
        real[i] += r; imaginary[i] += m;
      }
    }
  }
}

$("language").onclick = () => setLanguage(language === "ar" ? "en" : "ar");
$("record").onclick = toggleRecording;
$("file").onchange = () => { if ($("file").files[0]) { recorded = null; showSample($("file").files[0]); } };
$("upload").onsubmit = upload;
$("delete").onclick = removeVoice;
$("speak").onsubmit = speak;
$("stop").onclick = stopSound;
$("key").onchange = () => loadVoices().catch((error) => fail(error.message));
window.onresize = () => draw(shown);

let kept = null;
try { kept = localStorage.getItem("language"); } catch { /* private windows have none */ }
const wanted = new URLSearchParams(location.search).get("lang") || kept || navigator.language;
setLanguage(wanted.startsWith("ar") ? "ar" : "en");
draw(shown);
watch();
