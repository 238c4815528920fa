// What is asked of a page: contrast of its texts as they are drawn, and what the keyboard reaches. WCAG 2.2: 1.4.3, 2.1.1, 2.4.7.
var probe = (() => {
  // Nothing is on its way when it is looked at.
  const still = document.createElement("style");
  still.textContent = "*, ::before, ::after { transition: none !important; animation: none !important }";
  document.head.append(still);

  const CONTROLS = "a[href], button, input, select, textarea, summary, label[for], [tabindex]";
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 1;
  const ink = canvas.getContext("2d", { willReadFrequently: true });

  // Any colour that CSS can say, as [red, green, blue, alpha], 0 to 255 and 0 to 1.
  const known = new Map();
  function colour(text) {
    if (!known.has(text)) {
      ink.clearRect(0, 0, 1, 1);
      ink.fillStyle = text;
      ink.fillRect(0, 0, 1, 1);
      const [r, g, b, a] = ink.getImageData(0, 0, 1, 1).data;
      known.set(text, [r, g, b, a / 255]);
    }
    return known.get(text);
  }
  const over = (top, below, alpha) => [0, 1, 2].map((k) => top[k] * alpha + below[k] * (1 - alpha));

  // What lies behind an element's text, and how opaque it and all around it are.
  function behind(element) {
    const chain = [];
    for (let at = element; at; at = at.parentElement) chain.unshift(getComputedStyle(at));
    let ground = [255, 255, 255], opacity = 1;
    for (const style of chain) {
      opacity *= parseFloat(style.opacity);
      const fill = colour(style.backgroundColor);
      if (fill[3] > 0) ground = over(fill, ground, fill[3]);
    }
    return { ground, opacity };
  }
  function luminance(rgb) {
    const [r, g, b] = rgb.map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  }
  function contrast(one, other) {
    const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  }

  function visible(element) {
    if (!element.checkVisibility({ visibilityProperty: true, opacityProperty: true })) return false;
    const box = element.getBoundingClientRect();
    const page = document.documentElement;
    return box.width > 1 && box.height > 1 && box.right > 0 && box.left < page.clientWidth + page.scrollWidth;
  }
  // Texts that are drawn, with the element that draws them.
  function drawn() {
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    const found = [];
    while (walker.nextNode()) {
      const element = walker.currentNode.parentElement;
      if (walker.currentNode.data.trim() && !element.closest("script, style, noscript, template, metadata, defs") && visible(element))
        found.push([walker.currentNode.data.trim(), element]);
    }
    return found;
  }
  function faint() {
    const found = new Set();
    for (const [text, element] of drawn()) {
      const style = getComputedStyle(element);
      const { ground, opacity } = behind(element);
      const fill = colour(element.closest("svg") ? style.fill : style.color);
      const alpha = fill[3] * opacity;
      if (alpha < 0.05) continue; // not to be seen: shown when it is pointed at
      const size = parseFloat(style.fontSize), bold = parseInt(style.fontWeight) >= 700;
      const least = size >= 24 || (bold && size >= 18.66) ? 3 : 4.5;
      const ratio = contrast(over(fill, ground, alpha), ground);
      if (ratio < least)
        found.add(`${ratio.toFixed(2)}: ${JSON.stringify(text.slice(0, 30))} in ${path(element)}, ${style.color} on ${ground.map(Math.round)}`);
    }
    return [...found];
  }

  function path(element) {
    const name = (e) => e.tagName.toLowerCase() + (e.className && e.className.baseVal === undefined ? "." + e.className.trim().split(/\s+/).join(".") : "");
    return [element.parentElement, element].filter(Boolean).map(name).join(" > ") + (element.textContent ? ` (${element.textContent.trim().slice(0, 30)})` : "");
  }
  // What a person can press or type into. A label counts where its own control cannot be reached and it stands for it.
  function controls() {
    return [...document.querySelectorAll(CONTROLS)].filter((element) => {
      if (!visible(element) || element.disabled || element.tabIndex < -1 || element.closest("[inert], [aria-hidden=true]")) return false;
      if (element.matches("label")) {
        const own = document.getElementById(element.htmlFor), style = getComputedStyle(element);
        return (!own || !visible(own)) && style.cursor === "pointer" && style.pointerEvents !== "none";
      }
      return element.getAttribute("tabindex") !== "-1";
    });
  }
  const looks = (element) => {
    const style = getComputedStyle(element);
    const ring = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) > 0 ? style.outline : "";
    return [ring, style.boxShadow, style.backgroundColor, style.color, style.borderColor, style.textDecoration].join("|");
  };
  const typed = (element) => element.matches("textarea, input:not([type=checkbox], [type=radio], [type=submit])"); // has a caret
  let before, asked, reached, same, lost, round;
  function watch() {
    document.activeElement?.blur(); // it would look focused before
    asked = controls();
    before = new Map(asked.map((element) => [element, looks(element)]));
    [reached, same, lost, round] = [new Set(), new Set(), new Set(), false];
    return asked.length;
  }
  // Once for the page, however often it is looked at: a second listener would take every focus for one that came round.
  document.addEventListener("focusin", (event) => {
    if (!asked) return;
    const element = event.target;
    round = round || reached.has(element);
    reached.add(element);
    if (!visible(element)) lost.add(element);
    if (before.has(element) && !typed(element) && before.get(element) === looks(element)) same.add(element);
  });
  return {
    settled: () => new Promise((done) => requestAnimationFrame(() => setTimeout(done, 150))),
    texts: () => drawn().length,
    faint,
    watch,
    round: () => round,
    lost: () => [...lost].map(path),
    unreached: () => asked.filter((element) => !reached.has(element) && visible(element)).map(path),
    unseen: () => [...same].map(path),
  };
})();
