from hf_layershuffle_cli import main


main()
