from baleen.cli import main

main()
