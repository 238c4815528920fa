// The theme opens its menu and its search by labels of check boxes that are not shown: let the keyboard reach them, too.
// (Enter on a label that has the focus is the theme's own.)
const NAMES = { __drawer: "Menu", __search: "Search" };
for (const label of document.querySelectorAll(".md-header__button[for]")) {
  label.tabIndex = 0;
  label.setAttribute("role", "button");
  label.setAttribute("aria-label", NAMES[label.htmlFor] ?? label.title);
}
