// Text to image with the ExecuTorch programs of a bundle. README.md explains it.
// A test of the repository evaluates the arithmetic between `// begin` and `// end` on test vectors.

import java.io.File
import java.util.Random
import kotlin.math.max
import kotlin.math.min
import org.json.JSONObject
import org.pytorch.executorch.EValue
import org.pytorch.executorch.Module
import org.pytorch.executorch.Tensor

/** A step of sampler.json, with the fields that an application needs. */
class Step(val t: Int, val fromZ: Float, val fromOutput: Float, val fromNoise: Float)

class Sampler(val steps: List<Step>, val guidance: Float)

/** A bundle in a folder of the application. */
class MobileBundle(private val folder: File, variant: String = "executorch") {
    private val manifest = JSONObject(File(folder, "manifest.json").readText())
    private val modules = manifest.getJSONObject("variants").getJSONObject(variant).getJSONObject("modules")

    val conditions = manifest.getInt("conditions")

    /** The program that checks images; null if the bundle has none. */
    val safetyChecker: File? =
        if (manifest.isNull("safety_checker")) null else File(folder, manifest.getString("safety_checker"))

    val sampler: Sampler
        get() {
            val sampler = JSONObject(File(folder, "sampler.json").readText())
            val steps = sampler.getJSONArray("steps")
            return Sampler(
                List(steps.length()) { number ->
                    val step = steps.getJSONObject(number)
                    Step(
                        step.getInt("t"),
                        step.getDouble("from_z").toFloat(),
                        step.getDouble("from_output").toFloat(),
                        step.optDouble("from_noise", 0.0).toFloat(),
                    )
                },
                sampler.getDouble("guidance").toFloat(),
            )
        }

    fun file(module: String) = File(folder, modules.getJSONObject(module).getJSONArray("files").getString(0))

    fun inputShape(module: String, port: String) = shape(modules.getJSONObject(module).getJSONObject("inputs"), port)

    val imageShape: LongArray
        get() = shape(modules.getJSONObject("decoder").getJSONObject("outputs"), "image")

    private fun shape(ports: JSONObject, port: String): LongArray {
        val shape = ports.getJSONObject(port).getJSONArray("shape")
        return LongArray(shape.length()) { shape.getLong(it) }
    }
}

/** Opens a program, uses it and frees its memory. */
fun <T> withModule(file: File, use: (Module) -> T): T {
    val module = Module.load(file.path, Module.LOAD_MODE_MMAP)
    try {
        return use(module)
    } finally {
        module.destroy()
    }
}

/** The first output. A program has no names for its inputs: they are matched by order. */
fun Module.compute(vararg inputs: Tensor): FloatArray {
    val values = Array(inputs.size) { EValue.from(inputs[it]) }
    return forward(*values)[0].toTensor().dataAsFloatArray
}

/**
 * The caption's token ids, padded or truncated for the text encoder. `empty` are the ids of the empty caption in
 * vectors.json: start, end, then padding. `ids` come from the tokenizer, whether it truncates and pads or not.
 */
fun fitTokens(ids: IntArray, empty: IntArray): IntArray {
    val last = empty.size - 1
    val end = empty[1]
    val padding = empty[last]
    return IntArray(empty.size) { i ->
        // begin fitTokens
        val id = if (i >= ids.size) padding else if (i == last && ids.size > empty.size) end else ids[i]
        // end fitTokens
        id
    }
}

/** Unit Gaussian noise; a generator of the same seed gives the same image. */
fun gaussian(count: Int, random: Random) = FloatArray(count) { random.nextGaussian().toFloat() }

/** The latent after a step (SnapFusion Eq. 2, 3). `outputs` are the UNet's for the empty caption, then the caption. */
fun advance(z: FloatArray, outputs: FloatArray, w: Float, step: Step): FloatArray =
    FloatArray(z.size) { i ->
        // begin advance
        val uncond = outputs[i]
        val cond = outputs[z.size + i]
        val output = w * cond - (w - 1) * uncond
        val next = step.fromZ * z[i] + step.fromOutput * output
        // end advance
        next
    }

/** The latent with the fresh noise that a step of the consistency sampler adds. */
fun renoise(z: FloatArray, fresh: FloatArray, step: Step): FloatArray =
    FloatArray(z.size) { i ->
        // begin renoise
        val next = z[i] + step.fromNoise * fresh[i]
        // end renoise
        next
    }

/** An image [1,3,H,W] in 0 .. 1 as colors 0xAARRGGBB, row by row. */
fun colors(image: FloatArray): IntArray {
    val size = image.size / 3
    return IntArray(size) { i ->
        // begin colors
        val red = level(image[i])
        val green = level(image[size + i])
        val blue = level(image[2 * size + i])
        val color = (255 shl 24) or (red shl 16) or (green shl 8) or blue
        // end colors
        color
    }
}

fun level(value: Float): Int {
    // begin level
    val rounded = Math.rint((255 * value).toDouble())
    val level = max(0.0, min(255.0, rounded)).toInt()
    // end level
    return level
}

/** The condition c of the empty caption, then of the caption. */
fun encode(bundle: MobileBundle, rows: List<IntArray>): FloatArray =
    withModule(bundle.file("text_encoder")) { textEncoder ->
        val shape = bundle.inputShape("text_encoder", "token_ids")
        rows.map { row -> textEncoder.compute(Tensor.fromBlob(row, shape)) }.reduce { uncond, cond -> uncond + cond }
    }

/** All steps, from noise to the latent. */
fun denoise(bundle: MobileBundle, c: FloatArray, noise: FloatArray, fresh: () -> FloatArray): FloatArray =
    withModule(bundle.file("unet")) { unet ->
        val sampler = bundle.sampler
        // begin part: one call with both conditions, or one call for each
        val part = c.size / 2 * bundle.conditions
        // end part
        val conditions =
            (0 until c.size step part).map { first ->
                Tensor.fromBlob(c.copyOfRange(first, first + part), bundle.inputShape("unet", "c"))
            }
        var z = noise
        for (step in sampler.steps) {
            val zT = Tensor.fromBlob(z, bundle.inputShape("unet", "z_t"))
            val t = Tensor.fromBlob(floatArrayOf(step.t.toFloat()), bundle.inputShape("unet", "t"))
            val outputs = conditions.map { unet.compute(zT, t, it) }.reduce { uncond, cond -> uncond + cond }
            z = advance(z, outputs, sampler.guidance, step)
            if (step.fromNoise != 0f) z = renoise(z, fresh(), step)
        }
        z
    }

/**
 * The image for token ids (the empty caption's, the caption's), or null if it must not be shown. `fresh` gives as many
 * numbers as `noise` has, for each step that adds noise.
 */
fun generate(bundle: MobileBundle, ids: List<IntArray>, noise: FloatArray, fresh: () -> FloatArray): FloatArray? {
    val c = encode(bundle, ids)
    val latent = Tensor.fromBlob(denoise(bundle, c, noise, fresh), bundle.inputShape("decoder", "latent"))
    val image = withModule(bundle.file("decoder")) { it.compute(latent) }
    val checker = bundle.safetyChecker ?: return image
    val score = withModule(checker) { it.compute(Tensor.fromBlob(image, bundle.imageShape)) }
    return if (score[0] > 0) null else image
}
