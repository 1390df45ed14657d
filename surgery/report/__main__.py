"""python -m surgery.report RUN_DIR [RUN_DIR ...] [--out compare.html]"""

from surgery.report.compare import main

if __name__ == "__main__":
    main()
