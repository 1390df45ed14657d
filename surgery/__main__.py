"""python -m surgery +recipe=gqa_convert"""

from surgery.cli import main

if __name__ == "__main__":
    main()
