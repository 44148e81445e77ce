"""EmoScenes: small drawn scenes whose emotion is a documented sum of visible cues."""
