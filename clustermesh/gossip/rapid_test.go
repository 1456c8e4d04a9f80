package gossip

import _ "pgregory.net/rapid"
