from . import main


if __name__ == "__main__":  # not in the processes of a data loader
    main()
