package sim

import (
	"math/rand/v2"
	"slices"
	"time"

	"causeway/clustermesh/gossip"
)

// speakersPerCluster is how many nodes of a cluster are in the mesh pool.
const speakersPerCluster = 3

// mesh is clusters as the model sees them: alike but for one node more or less.
type mesh struct {
	nodes, clusters int
	loss            float64
	delay, far      int // one way within a cluster and between clusters, in steps
	cluster, mesh   gossip.Profile
	timing          gossip.Timing
	retransmit      int // multiplier for what is not memberlist's own news
}

// size returns how many nodes a cluster has.
func (w mesh) size(cluster int) int {
	n := w.nodes / w.clusters
	if cluster < w.nodes%w.clusters {
		n++
	}
	return n
}

func (w mesh) pool(cluster, dead int) medium {
	n := w.size(cluster)
	return medium{Profile: w.cluster, members: n, live: n - dead, loss: w.loss, delay: w.delay, retransmit: w.cluster.RetransmitMult}
}

// news is the pool for what we carry through it ourselves: its queue is our own.
func (w mesh) news(m medium) medium {
	m.retransmit, m.urgent = w.retransmit, urgentMembers
	return m
}

func (w mesh) speakers() int { return min(speakersPerCluster, w.nodes/w.clusters) }

func (w mesh) speakerPool(dead int) medium {
	n := w.clusters * w.speakers()
	return medium{Profile: w.mesh, members: n, live: n - dead, loss: w.loss, delay: w.far, retransmit: w.mesh.RetransmitMult}
}

// nodeDeath is what follows when a node of the first cluster dies at step 0.
type nodeDeath struct {
	accused, accusedAll int  // first and last member of its pool that declares it dead
	verdict             int  // it is dead for sure
	everywhere          int  // the last node of the mesh knows that
	missed              bool // gossip has not reached everyone by itself
}

func (w mesh) killNode(r *rand.Rand) nodeDeath {
	m := w.pool(0, 1)
	a := accuse(r, m, 1)
	d := nodeDeath{accused: a.first(), accusedAll: a.dead.last(), verdict: verdict(r, m, w.timing, a)}
	own := spread(r, w.news(m), []seed{{d.verdict, 1}})
	d.reach(own)
	if w.clusters > 1 {
		w.toOthers(r, own, &d)
	}
	return d
}

func (d *nodeDeath) reach(c *curve) {
	d.everywhere = max(d.everywhere, c.last())
	d.missed = d.missed || len(c.late) > 0
}

// toOthers carries what goes round in the first cluster to the last node of all others.
func (w mesh) toOthers(r *rand.Rand, own *curve, d *nodeDeath) {
	k := w.speakers()
	between := spread(r, w.news(w.speakerPool(0)), seedsOf(own, distinct(r, k, w.size(0)-1)))
	// The first that hears it in the mesh pool is certainly one of the first cluster's.
	ranks := r.Perm(w.clusters*k - 1)
	for i := range ranks {
		ranks[i]++
	}
	for c := 1; c < w.clusters; c++ {
		its := ranks[(c-1)*k : c*k]
		d.reach(spread(r, w.news(w.pool(c, 0)), seedsOf(between, its)))
	}
}

// seedsOf returns when the members of these ranks know, as seeds of another pool that they belong to as well.
func seedsOf(c *curve, ranks []int) []seed {
	at := make([]int, len(ranks))
	for i, rank := range ranks {
		at[i] = c.at(rank)
	}
	slices.Sort(at)
	return merge(at, at[len(at)-1])
}

// clusterDeath is what follows when all nodes of a cluster die at step 0.
type clusterDeath struct {
	verdict    int // the first of the others has a majority of its speakers
	everywhere int // the last node of the others knows
}

func (w mesh) killCluster(r *rand.Rand) clusterDeath {
	k := w.speakers()
	m := w.speakerPool(k)
	a := accuse(r, m, k)
	ranks := r.Perm(m.live)
	var d clusterDeath
	t := w.timing
	for c := 1; c < w.clusters; c++ {
		accused := seedsOf(a.dead, ranks[(c-1)*k:c*k])
		// The last sign of life was just before the death at the latest.
		at := max(steps(t.ClusterSilence), majority(accused, k)+steps(time.Duration(t.Echoes)*t.Urgent)) + steps(stepInterval)
		if c == 1 || at < d.verdict {
			d.verdict = at
		}
		d.everywhere = max(d.everywhere, spread(r, w.news(w.pool(c, 0)), []seed{{at, 1}}).last())
	}
	return d
}

// majority returns when more than half of n have voted.
func majority(votes []seed, n int) int {
	sum := 0
	for _, v := range votes {
		if sum += v.members; 2*sum > n {
			return v.at
		}
	}
	return votes[len(votes)-1].at
}
