package sim

import (
	"math"
	"math/rand/v2"
	"slices"
	"time"

	"causeway/clustermesh/gossip"
)

// What clustermesh/gossip does in the mesh, besides gossip.Timing.
const (
	speakersPerCluster = 3 // nodes that are in the mesh pool
	sampleSize         = 5 // nodes of another cluster that a speaker sends echoes to
	// lookInterval is the longest time between two looks of a speaker that has nothing to look at: whatever comes in, as
	// each answer to its probes does, makes it look.
	lookInterval = 100 * time.Millisecond
)

// mesh is clusters as the model sees them: alike but for one node more or less.
type mesh struct {
	nodes, clusters int
	loss            float64
	delay, far      int // one way within a cluster and between clusters, in steps
	cluster, mesh   gossip.Profile
	timing          gossip.Timing
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
	return medium{Profile: w.cluster, members: n, live: n - dead, loss: w.loss, delay: w.delay}
}

// news is the pool for what we carry through it ourselves.
func (m medium) news() medium {
	m.urgent = urgentMembers
	return m
}

func (w mesh) speakers() int { return min(speakersPerCluster, w.nodes/w.clusters) }

func (w mesh) speakerPool(dead int) medium {
	n := w.clusters * w.speakers()
	return medium{Profile: w.mesh, members: n, live: n - dead, loss: w.loss, delay: w.far}
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
	own := spread(r, m.news(), []seed{{d.verdict, 1}})
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
	between := spread(r, w.speakerPool(0).news(), seedsOf(own, distinct(r, k, w.size(0)-1)))
	// The first that hears it in the mesh pool is certainly one of the first cluster's.
	ranks := r.Perm(w.clusters*k - 1)
	for i := range ranks {
		ranks[i]++
	}
	for c := 1; c < w.clusters; c++ {
		its := ranks[(c-1)*k : c*k]
		d.reach(spread(r, w.pool(c, 0).news(), seedsOf(between, its)))
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
	for c := 1; c < w.clusters; c++ {
		votes := make([]int, k)
		for i, rank := range ranks[(c-1)*k : c*k] {
			// It sends an echo when it hears of a member's death, or when it misses the answers to its own probes.
			asked := min(a.dead.at(rank), w.stale(r, m))
			votes[i] = asked + steps(w.timing.ClusterSilence) + r.IntN(steps(stepInterval))
		}
		slices.Sort(votes)
		at := votes[k/2] // more than half have voted
		if c == 1 || at < d.verdict {
			d.verdict = at
		}
		d.everywhere = max(d.everywhere, spread(r, w.pool(c, 0).news(), []seed{{at, 1}}).last())
	}
	return d
}

// stale returns when a speaker first sends an echo to a cluster that dies at step 0 because no member of it has answered
// its probes for ClusterStale. If they have not had their turn for long, echoes have come back in their stead.
func (w mesh) stale(r *rand.Rand, m medium) int {
	interval, after := steps(m.ProbeInterval), steps(w.timing.ClusterStale)
	look := r.IntN(steps(lookInterval))
	ago := r.IntN(interval) + interval*geometric(r, w.answered(m))
	return w.far - ago%(after+look+2*w.far) + after + look // what was answered before the death arrives after it
}

// answered is the share of a speaker's probes that a member of one given other cluster answers.
func (w mesh) answered(m medium) float64 {
	return float64(w.speakers()) / float64(m.members-1) * (1 - w.loss) * (1 - w.loss)
}

// echoes returns how many echoes and answers a speaker sends in a second while all clusters are well. It asks one node of a cluster
// whenever no member of that has had its turn for ClusterStale, and after a loss all of its sample.
func (w mesh) echoes() float64 {
	m := w.speakerPool(0)
	period := w.timing.ClusterStale + lookInterval/2 + 2*time.Duration(w.far)*step
	turn, often := w.answered(m), 0.0 // often: per answered probe
	for n := 1.0; n <= 1000; n++ {    // of 255 clusters, nothing of note is left after a few hundred
		often += math.Pow(1-turn, math.Floor(n*float64(period)/float64(m.ProbeInterval)))
	}
	sample := float64(min(sampleSize, w.nodes/w.clusters))
	lost := 1 - (1-w.loss)*(1-w.loss)
	perCluster := often * turn / m.ProbeInterval.Seconds() * (1 + lost*sample)
	answers := perCluster * float64(w.speakers()) / sample * (1 - w.loss)
	return float64(w.clusters-1) * (perCluster + answers)
}
