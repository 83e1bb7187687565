// MathJax 3.2.2 from beside this file, not from elsewhere, and only on pages with formulas.
window.MathJax = {
  tex: { inlineMath: [["\\(", "\\)"]], displayMath: [["\\[", "\\]"]] },
  options: { ignoreHtmlClass: ".*", processHtmlClass: "arithmatex", enableMenu: false },
};
(function () {
  const here = document.currentScript.src;
  document.addEventListener("DOMContentLoaded", function () {
    if (!document.querySelector(".arithmatex")) return;
    const script = document.createElement("script");
    script.src = new URL("tex-svg.js", here);
    document.head.appendChild(script);
  });
})();
