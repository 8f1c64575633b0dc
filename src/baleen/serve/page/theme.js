// Runs before the first paint: a page that is to be dark never flashes white. Not a module, since modules wait.
{
  const theme = localStorage.getItem("baleen.theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
}
